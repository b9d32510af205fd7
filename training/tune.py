"""Tunes a workload on this machine with Optuna, by the same specification as a tuning on Vertex AI.

    python -m training.tune --spec training/digits_tuning.yaml --job-dir output -- --train-steps 500

Each trial is a process `python -m training.digits --NAME=VALUE … --job-dir output/trials/N`, which reports its metric
through cloudml-hypertune, as on Vertex AI. A trial that fails counts as failed, and the study continues. The options
after `--` go to every trial. The same command continues a study that was stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import yaml
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from training.common import UsageError, command, options_for_runs, whole

POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Spec:
    """A tuning: the parameters by their names, and the metric to maximise or minimise."""

    metric: str
    direction: StudyDirection
    parameters: dict[str, BaseDistribution]
    trials: int
    parallel: int
    failures: int  # ends the study; 0: never

    @classmethod
    def load(cls, file: Path) -> Spec:
        """Reads the fields of a HyperparameterTuningJob. Raises UsageError, and OSError if the file is unreadable."""
        try:
            given = yaml.safe_load(file.read_text())
            (metric,) = given["studySpec"]["metrics"]
            spec = cls(
                metric=metric["metricId"],
                direction=StudyDirection[metric["goal"]],
                parameters={one["parameterId"]: distribution(one) for one in given["studySpec"]["parameters"]},
                trials=int(given["maxTrialCount"]),
                parallel=int(given.get("parallelTrialCount", 1)),
                failures=int(given.get("maxFailedTrialCount", 0)),
            )
        except KeyError as error:
            raise UsageError(f"{file}: the field or value {error} is missing or unknown") from None
        except (yaml.YAMLError, TypeError, ValueError) as error:
            raise UsageError(f"{file}: {error}") from None
        if spec.trials < 1 or spec.parallel < 1:
            raise UsageError(f"{file}: maxTrialCount and parallelTrialCount must be at least 1")
        return spec


def distribution(parameter: Mapping[str, Any]) -> BaseDistribution:
    """Returns Optuna's distribution for a parameter of a study. Raises KeyError and ValueError."""
    log = {"UNIT_LINEAR_SCALE": False, "UNIT_LOG_SCALE": True}[parameter.get("scaleType", "UNIT_LINEAR_SCALE")]
    if given := parameter.get("integerValueSpec"):
        return IntDistribution(int(given["minValue"]), int(given["maxValue"]), log=log)
    if given := parameter.get("doubleValueSpec"):
        return FloatDistribution(float(given["minValue"]), float(given["maxValue"]), log=log)
    for kind in ("discreteValueSpec", "categoricalValueSpec"):
        if given := parameter.get(kind):
            return CategoricalDistribution(given["values"])
    raise ValueError(f"{parameter['parameterId']} has no integer-, double-, discrete- or categoricalValueSpec")


class TrialError(Exception):
    """A trial failed; the message says why."""


class Trial:
    """A running trial: a process of the workload in a folder of its own."""

    def __init__(self, workload: str, number: int, parameters: Mapping[str, Any], options: Sequence[str], folder: Path,
                 threads: int) -> None:  # fmt: skip
        self.folder = folder / "trials" / str(number)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._metrics = self.folder / "output.metrics"
        environment = {name: value for name, value in os.environ.items() if not name.startswith("AIP_")}
        environment |= {"CLOUD_ML_TRIAL_ID": str(number), "CLOUD_ML_HP_METRIC_FILE": str(self._metrics)}
        environment.setdefault("OMP_NUM_THREADS", str(threads))
        words = [*options, *(f"--{name}={value}" for name, value in parameters.items())]
        with (self.folder / "log").open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", f"training.{workload}", "--job-dir", str(self.folder), "--fresh", *words],
                stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment,
            )  # fmt: skip

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def metric(self, name: str) -> float:
        """Returns the metric that the ended trial reported last. Raises TrialError."""
        if self._process.returncode:
            said = (self.folder / "log").read_text(errors="replace").strip().splitlines() or ["it printed nothing"]
            raise TrialError(f"exit code {self._process.returncode}: {said[-1]} ({self.folder / 'log'})")
        try:
            return float(json.loads(self._metrics.read_text().splitlines()[-1])[name])
        except (OSError, ValueError, LookupError):
            raise TrialError(f"it reported no {name} ({self.folder / 'log'})") from None

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait()


def tune(study: optuna.Study, spec: Spec, start: Callable[[int, dict[str, Any]], Trial]) -> None:
    """Runs the trials that the study lacks. Raises UsageError after spec.failures failed trials.

    start: starts the trial with a number and parameters. Trials that run when this ends are stopped.
    """
    for interrupted in study.get_trials(states=[TrialState.RUNNING]):
        study.tell(interrupted.number, state=TrialState.PRUNED)  # does not count: the study was killed, not the trial
    running: dict[int, Trial] = {}
    try:
        while running or ended(study) < spec.trials:
            while len(running) < spec.parallel and ended(study) + len(running) < spec.trials:
                asked = study.ask(dict(spec.parameters))
                running[asked.number] = start(asked.number, asked.params)
            for number in [number for number, trial in running.items() if not trial.running]:
                try:
                    value = running.pop(number).metric(spec.metric)
                    study.tell(number, value)
                    print(f"trial {number}: {spec.metric} {value:.4f}", flush=True)
                except TrialError as error:
                    study.tell(number, state=TrialState.FAIL)
                    print(f"trial {number} failed: {error}", file=sys.stderr, flush=True)
            if spec.failures and len(study.get_trials(states=[TrialState.FAIL])) >= spec.failures:
                raise UsageError(f"{spec.failures} trials failed, as many as maxFailedTrialCount allows")
            time.sleep(POLL_SECONDS)
    finally:
        for trial in running.values():
            trial.stop()


def ended(study: optuna.Study) -> int:
    """Returns the number of trials that count: those that succeeded or failed."""
    return len(study.get_trials(deepcopy=False, states=[TrialState.COMPLETE, TrialState.FAIL]))


def table(study: optuna.Study, metric: str) -> str:
    """Returns the successful trials with their parameters, the best first, as text."""
    best_first = sorted(succeeded(study), key=lambda one: one.value or 0.0,
                        reverse=study.direction is StudyDirection.MAXIMIZE)  # fmt: skip
    names = sorted({name for one in best_first for name in one.params})
    rows = [["trial", metric, *names]]
    for one in best_first:
        rows.append([str(one.number), f"{one.value:.4f}", *(f"{one.params[name]:.4g}" for name in names)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.rjust, row, widths)) for row in rows)


def plot(study: optuna.Study, file: Path) -> None:
    """Draws each successful trial as a line through its parameters (parallel coordinates)."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    with warnings.catch_warnings(action="ignore"):  # Optuna calls its plots by matplotlib experimental
        optuna.visualization.matplotlib.plot_parallel_coordinate(study)
    pyplot.gcf().set_size_inches(9, 4)
    pyplot.savefig(file, dpi=120, bbox_inches="tight")
    pyplot.close("all")


def succeeded(study: optuna.Study) -> list[FrozenTrial]:
    return study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="tune", description=__doc__.partition("\n")[0])
    parser.add_argument("--spec", type=Path, required=True, metavar="FILE", help="fields of a HyperparameterTuningJob")
    parser.add_argument(
        "--job-dir", type=Path, required=True, metavar="DIR", help="folder for the study and its trials"
    )
    parser.add_argument("--workload", default="digits", help="module of training/ (%(default)s)")
    parser.add_argument("--trials", type=whole, metavar="N", help="number of trials (maxTrialCount)")
    parser.add_argument("--parallel", type=whole, metavar="N", help="trials at a time (parallelTrialCount)")
    parser.add_argument("--seed", type=int, default=0, help="of the proposals (%(default)s)")
    parser.epilog = "Options after -- go to every trial."
    own, options = options_for_runs(argv)
    arguments = parser.parse_args(own)
    spec = Spec.load(arguments.spec)
    changes = {"trials": arguments.trials or spec.trials, "parallel": arguments.parallel or spec.parallel}
    spec = Spec(**(vars(spec) | changes))
    arguments.job_dir.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    backend = JournalFileBackend(str(arguments.job_dir / "study.log"))
    study = optuna.create_study(
        study_name="tuning", storage=optuna.storages.JournalStorage(backend), direction=spec.direction,
        sampler=optuna.samplers.TPESampler(seed=arguments.seed), load_if_exists=True,
    )  # fmt: skip
    threads = max(1, len(os.sched_getaffinity(0)) // spec.parallel)

    def start(number: int, parameters: dict[str, Any]) -> Trial:
        return Trial(arguments.workload, number, parameters, options, arguments.job_dir, threads)

    tune(study, spec, start)
    if not succeeded(study):
        raise UsageError(f"no trial succeeded; see {arguments.job_dir / 'trials'}")
    print(table(study, spec.metric))
    plot(study, arguments.job_dir / "trials.png")
    print(f"the best model is in {arguments.job_dir / 'trials' / str(study.best_trial.number) / 'model'}")


if __name__ == "__main__":
    command(main)
