"""Measures the effect of augmentation, of transfer learning, and of the methods of the architecture search.

    python -m training.experiments augmentation|transfer|search --job-dir output --seeds 3

Each experiment runs workloads several times, in folders of its own below --job-dir, and prints a table for
training/README.md. `search` draws a plot too. The same command continues an experiment that was stopped.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from training import common, digits, search

AUGMENTATIONS = ("", "crop", "brightness,contrast", "flip", "crop,brightness,contrast,flip")
PRETRAINED_ON, FINE_TUNED_ON = "01234", "56789"

Runs = dict[str, list[list[float]]]  # for each variant and seed: an accuracy, or the accuracy of each trial


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


def plot(runs: Runs, file: Path) -> None:
    """Draws the best accuracy so far against the number of trials: the mean of the seeds, and their range."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, found in runs.items():
        best = best_so_far(found) * 100
        trials = np.arange(1, best.shape[1] + 1)
        (line,) = axes.plot(trials, best.mean(0), label=name)
        axes.fill_between(trials, best.min(0), best.max(0), color=line.get_color(), alpha=0.15)
    axes.set(
        xlabel="trials", ylabel="best hold-out accuracy so far in %", title=f"mean and range of {len(found)} seeds"
    )
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


EXPERIMENTS: dict[str, Callable[[Path, int, Sequence[str]], Runs]] = {
    "augmentation": augmentation, "transfer": transfer, "search": architectures,
}  # fmt: skip


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="experiments", description=__doc__.partition("\n")[0])
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--job-dir", type=Path, required=True, metavar="DIR", help="folder for the runs")
    parser.add_argument("--seeds", type=common.whole, default=3, help="runs of each variant (%(default)s)")
    parser.epilog = "Options after -- go to every run."
    own, options = common.options_for_runs(argv)
    arguments = parser.parse_args(own)
    runs = EXPERIMENTS[arguments.experiment](arguments.job_dir, arguments.seeds, options)
    print(table(runs))
    if arguments.experiment == "search":
        plot(runs, arguments.job_dir / "search.png")
        print(f"the plot is {arguments.job_dir / 'search.png'}")


if __name__ == "__main__":
    common.command(main)
