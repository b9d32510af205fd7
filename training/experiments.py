"""Measures how the workloads learn, and the effect of augmentation, of transfer learning, and of the search's methods.

    python -m training.experiments census|digits|augmentation|transfer|search --job-dir output --seeds 3

Each experiment runs workloads several times, in folders of its own below --job-dir, and prints a table for
training/README.md. `census` and `digits` draw learning curves, `search` the accuracy found so far. The same command
continues an experiment that was stopped.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from training import census, common, digits, search

AUGMENTATIONS = ("", "crop", "brightness,contrast", "flip", "crop,brightness,contrast,flip")
PRETRAINED_ON, FINE_TUNED_ON = "01234", "56789"

NETWORKS = {  # of the learning curves of digits
    **{name: ["--model", name] for name in ("linear", "dnn", "dnn_dropout", "cnn")},
    "cnn, batch norm": ["--model", "cnn", "--batch-norm"],
}
EVAL_EVERY = 100  # steps between two points of a learning curve

# For each variant and seed: an accuracy, or the accuracy of each trial, or that of each evaluation.
Runs = dict[str, list[list[float]]]


def census_curve(folder: Path, seeds: int, options: Sequence[str]) -> Runs:
    """Returns the accuracy on adult.test after every EVAL_EVERY steps."""
    return {"wide and deep": [_curve(census.main, folder / str(seed), seed, options) for seed in range(seeds)]}


def digits_curves(folder: Path, seeds: int, options: Sequence[str]) -> Runs:
    """Returns the accuracy of each network on MNIST's test set after every EVAL_EVERY steps."""
    return {
        name: [_curve(digits.main, folder / name / str(seed), seed, [*chosen, *options]) for seed in range(seeds)]
        for name, chosen in NETWORKS.items()
    }


def _curve(main: Callable[[Sequence[str]], None], job_dir: Path, seed: int, options: Sequence[str]) -> list[float]:
    """Trains, if the folder has no model yet, and returns the accuracies that TensorBoard shows."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if not (job_dir / "model" / "contract.json").exists():
        main(["--job-dir", str(job_dir), "--seed", str(seed), *options, "--eval-every", str(EVAL_EVERY)])
    found = EventAccumulator(str(job_dir / "logs")).Reload().Scalars("accuracy")
    # The last evaluation may be between two points; it is the only one of a run that is shorter than that.
    return [float(one.value) for one in found if one.step % EVAL_EVERY == 0] or [float(found[-1].value)]


def augmentation(folder: Path, seeds: int, options: Sequence[str], labels: int = 100) -> Runs:
    """Returns the test accuracy of the CNN trained on 100 labels a class, for each kind of augmentation."""
    found: Runs = {}
    for names in AUGMENTATIONS:
        for seed in range(seeds):
            chosen = ["--labels-per-class", str(labels), "--augment", names, "--seed", str(seed)]
            accuracy = train_digits(folder / (names or "none") / str(seed), [*chosen, *options])
            found.setdefault(names or "none", []).append([accuracy])
    return found


def transfer(folder: Path, seeds: int, options: Sequence[str], labels: int = 10) -> Runs:
    """Returns the test accuracy on the classes 5 to 9 with 10 labels each, for random and for pretrained weights."""
    found: Runs = {"random": [], "pretrained": []}
    for seed in range(seeds):
        pretrained = folder / "pretrained" / str(seed)
        train_digits(pretrained, ["--classes", PRETRAINED_ON, "--seed", str(seed), *options])
        few = ["--classes", FINE_TUNED_ON, "--labels-per-class", str(labels), "--seed", str(seed), *options]
        few += ["--train-batch-size", "50"]
        for name, start in (("random", []), ("pretrained", ["--init-from", str(pretrained)])):
            found[name].append([train_digits(folder / f"few-{name}" / str(seed), [*few, *start])])
    return found


def architectures(folder: Path, seeds: int, options: Sequence[str]) -> Runs:
    """Returns for each method the hold-out accuracy of each trial, in order."""
    found: Runs = {}
    for method in search.METHODS:
        for seed in range(seeds):
            job_dir = folder / method / str(seed)
            if not (job_dir / "model" / "contract.json").exists():
                search.main(["--job-dir", str(job_dir), "--method", method, "--seed", str(seed), *options])
            origin = json.loads((job_dir / "model" / "contract.json").read_text())["origin"]
            found.setdefault(method, []).append(origin["trial_accuracies"])
    return found


def train_digits(job_dir: Path, options: Sequence[str]) -> float:
    """Trains digits, if the folder has no model yet, and returns the accuracy."""
    contract = job_dir / "model" / "contract.json"
    if not contract.exists():
        digits.main(["--job-dir", str(job_dir), *options])
    return float(json.loads(contract.read_text())["metrics"]["accuracy"])


def best_so_far(runs: Sequence[Sequence[float]]) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """Returns the best accuracy up to each trial, shape [seeds, trials]."""
    return np.maximum.accumulate(np.asarray(runs, np.float64), axis=1)


def table(runs: Runs) -> str:
    """Returns the best accuracy of each variant in percent as a Markdown table: the mean and each seed."""
    rows = ["| variant | mean | seeds |", "|---|---|---|"]
    for name, found in runs.items():
        best = best_so_far(found)[:, -1] * 100
        rows.append(f"| {name} | {best.mean():.1f} | {', '.join(f'{one:.1f}' for one in best)} |")
    return "\n".join(rows)


def curve_table(runs: Runs) -> str:
    """Returns the accuracy of each variant after some steps in percent as a Markdown table: the mean of the seeds."""
    means = {name: np.asarray(found, np.float64).mean(0) * 100 for name, found in runs.items()}
    points = min(map(len, means.values()))
    shown = [*(point for point in (1, 2, 5, 10, 20) if point < points), points]
    rows = [f"| steps | {' | '.join(str(point * EVAL_EVERY) for point in shown)} |", "|---" * (1 + len(shown)) + "|"]
    rows += [f"| {name} | {' | '.join(f'{mean[point - 1]:.1f}' for point in shown)} |" for name, mean in means.items()]
    return "\n".join(rows)


def plot_curves(runs: Runs, file: Path) -> None:
    """Draws the accuracy against the number of steps."""
    curves = {name: np.asarray(found, np.float64) for name, found in runs.items()}
    _plot(curves, EVAL_EVERY, "steps", "accuracy in %", file)


def plot_search(runs: Runs, file: Path) -> None:
    """Draws the best accuracy so far against the number of trials."""
    best = {name: best_so_far(found) for name, found in runs.items()}
    _plot(best, 1, "trials", "best hold-out accuracy so far in %", file)


def _plot(
    lines: dict[str, np.ndarray[tuple[int, int], np.dtype[np.float64]]], step: int, xlabel: str, ylabel: str, file: Path
) -> None:
    """Draws the mean of the seeds and their range. lines: accuracies, shape [seeds, points], of each variant."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, found in lines.items():
        points = np.arange(1, found.shape[1] + 1) * step
        (line,) = axes.plot(points, found.mean(0) * 100, label=name)
        axes.fill_between(points, found.min(0) * 100, found.max(0) * 100, color=line.get_color(), alpha=0.15)
    seeds = max(len(found) for found in lines.values())
    axes.set(xlabel=xlabel, ylabel=ylabel, title=f"mean and range of {seeds} seeds" if seeds > 1 else "")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


Experiment = Callable[[Path, int, Sequence[str]], Runs]
Table = Callable[[Runs], str]
Plot = Callable[[Runs, Path], None]
EXPERIMENTS: dict[str, tuple[Experiment, Table, Plot | None]] = {
    "census": (census_curve, curve_table, plot_curves),
    "digits": (digits_curves, curve_table, plot_curves),
    "augmentation": (augmentation, table, None),
    "transfer": (transfer, table, None),
    "search": (architectures, table, plot_search),
}


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="experiments", description=__doc__.partition("\n")[0])
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--job-dir", type=Path, required=True, metavar="DIR", help="folder for the runs")
    parser.add_argument("--seeds", type=common.whole, default=3, help="runs of each variant (%(default)s)")
    parser.epilog = "Options after -- go to every run."
    own, options = common.options_for_runs(argv)
    arguments = parser.parse_args(own)
    measure, as_table, plot = EXPERIMENTS[arguments.experiment]
    runs = measure(arguments.job_dir, arguments.seeds, options)
    print(as_table(runs))
    if plot:
        file = arguments.job_dir / f"{arguments.experiment}.png"
        plot(runs, file)
        print(f"the plot is {file}")


if __name__ == "__main__":
    common.command(main)
