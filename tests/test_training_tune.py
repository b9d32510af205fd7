"""The tuning on this machine: its specification, its trials, failures, and continuation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from google.cloud.aiplatform_v1.types import HyperparameterTuningJob
from helpers import ROOT
from optuna.distributions import FloatDistribution, IntDistribution
from optuna.study import StudyDirection
from training_data import typed_by_make, write_digits

from training import digits, tune
from training.common import UsageError
from training.tune import Spec, Trial

SPEC = ROOT / "training" / "digits_tuning.yaml"


def test_the_tuning_of_digits_is_as_the_old_guide_says() -> None:
    assert Spec.load(SPEC) == Spec(
        metric="accuracy",
        direction=StudyDirection.MAXIMIZE,
        parameters={
            "train-batch-size": IntDistribution(32, 512),
            "learning-rate": FloatDistribution(0.001, 0.1, log=True),
            "nfil1": IntDistribution(5, 20),
            "nfil2": IntDistribution(10, 30),
            "dprob": FloatDistribution(0.1, 0.6),
        },
        trials=30,
        parallel=2,
        failures=0,
    )


def test_vertex_ai_takes_the_same_file_and_digits_its_parameters() -> None:
    job = HyperparameterTuningJob.from_json(json.dumps(yaml.safe_load(SPEC.read_text())))
    assert (job.max_trial_count, job.parallel_trial_count) == (30, 2)
    assert [one.parameter_id for one in job.study_spec.parameters] == list(Spec.load(SPEC).parameters)
    digits.parse([f"--{one.parameter_id}=0.5" if "prob" in one.parameter_id else f"--{one.parameter_id}=33"
                  for one in job.study_spec.parameters])  # fmt: skip


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"maxTrialCount": 0}, "at least 1"),
        ({"maxTrialCount": None}, "maxTrialCount|NoneType"),
        ({"studySpec": {"metrics": [{"metricId": "a", "goal": "BEST"}]}}, "'BEST'"),
        ({"studySpec": {"metrics": [{"metricId": "a", "goal": "MINIMIZE"}]}}, "'parameters'"),
        (
            {"studySpec": {"metrics": [{"metricId": "a", "goal": "MINIMIZE"}], "parameters": [{"parameterId": "p"}]}},
            "p has no integer",
        ),
        (None, "hyperparameters.yaml"),
    ],
)
def test_a_wrong_specification_is_explained(change: dict[str, Any] | None, says: str, tmp_path: Path) -> None:
    file = tmp_path / "hyperparameters.yaml"
    file.write_text("a: [" if change is None else yaml.safe_dump(yaml.safe_load(SPEC.read_text()) | change))
    with pytest.raises(UsageError, match=says) as error:
        Spec.load(file)
    assert str(file) in str(error.value)


class FakeTrial(Trial):
    """A trial without a process, which runs as long as it is asked a number of times."""

    def __init__(self, value: float | None, asked: int = 2) -> None:
        self.value, self.asked, self.stopped = value, asked, False

    @property
    def running(self) -> bool:
        self.asked -= 1
        return self.asked >= 0

    def metric(self, name: str) -> float:
        if self.value is None:
            raise tune.TrialError("it crashed")
        return self.value

    def stop(self) -> None:
        self.stopped = True


def spec(trials: int, parallel: int = 2, failures: int = 0) -> Spec:
    return Spec("accuracy", StudyDirection.MAXIMIZE, {"x": FloatDistribution(0, 1)}, trials, parallel, failures)


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> optuna.Study:
    monkeypatch.setattr(tune, "POLL_SECONDS", 0)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(seed=1))


def test_a_trial_that_crashes_counts_and_the_study_goes_on(
    study: optuna.Study, capsys: pytest.CaptureFixture[str]
) -> None:
    most, now = 0, []

    def start(number: int, parameters: dict[str, Any]) -> Trial:
        nonlocal most
        now.append(FakeTrial(None if number == 1 else parameters["x"]))
        most = max(most, sum(one.asked >= 0 for one in now))
        return now[-1]

    tune.tune(study, spec(5), start)
    assert len(now) == 5
    assert most == 2
    assert tune.ended(study) == 5
    assert [one.number for one in tune.succeeded(study)] == [0, 2, 3, 4]
    assert "trial 1 failed: it crashed" in capsys.readouterr().err
    rows = [line.split() for line in tune.table(study, "accuracy").splitlines()]
    assert rows[0] == ["trial", "accuracy", "x"]
    assert rows[1][0] == str(study.best_trial.number)
    assert [row[1] for row in rows[1:]] == sorted((row[1] for row in rows[1:]), reverse=True)


def test_a_study_that_was_killed_continues(study: optuna.Study) -> None:
    study.ask({"x": FloatDistribution(0, 1)})  # its process is gone
    started: list[int] = []

    def start(number: int, parameters: dict[str, Any]) -> Trial:
        started.append(number)
        return FakeTrial(0.5)

    tune.tune(study, spec(2), start)
    assert started == [1, 2]
    tune.tune(study, spec(3), start)
    assert started == [1, 2, 3]


def test_many_failures_end_a_study_and_stop_what_runs(study: optuna.Study) -> None:
    made: list[FakeTrial] = []

    def start(number: int, parameters: dict[str, Any]) -> Trial:
        made.append(FakeTrial(None, 1000 if number == 0 else 1))
        return made[-1]

    with pytest.raises(UsageError, match="3 trials failed"):
        tune.tune(study, spec(9, failures=3), start)
    assert [one.stopped for one in made] == [True] + [False] * 3


@pytest.mark.slow
def test_trials_are_processes_that_report_their_metric(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_digits(tmp_path / "mnist", train=100, test=50)
    options = ["--data-dir", str(data), "--model", "linear", "--train-steps", "3"]
    good = Trial("digits", 0, {"nfil1": 6, "train-batch-size": 40}, options, tmp_path, threads=1)
    bad = Trial("digits", 1, {"learning-rate": -1}, options, tmp_path, threads=1)
    good._process.wait()
    bad._process.wait()
    with pytest.raises(tune.TrialError, match=r"exit code 2: .*--learning-rate"):
        bad.metric("accuracy")
    with pytest.raises(tune.TrialError, match="it reported no auc"):
        good.metric("auc")
    made = json.loads((good.folder / "model" / "contract.json").read_text())
    assert good.metric("accuracy") == made["metrics"]["accuracy"]
    assert made["origin"]["options"]["train_batch_size"] == "40"


def test_the_command_continues_a_finished_study_and_prints_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started = []

    class Fake(FakeTrial):
        def __init__(self, workload: str, number: int, parameters: dict[str, Any], *others: Any) -> None:
            super().__init__(0.9 + number / 100)
            started.append((workload, number, others[0]))

    monkeypatch.setattr(tune, "Trial", Fake)
    monkeypatch.setattr(tune, "POLL_SECONDS", 0)
    module, *command = typed_by_make("tune", f"RUN={tmp_path}", "ARGS=--trials 2 -- --train-steps 7")
    assert module == "training.tune"
    monkeypatch.chdir(ROOT)
    tune.main(command)
    assert started == [("digits", 0, ["--train-steps", "7"]), ("digits", 1, ["--train-steps", "7"])]
    first = capsys.readouterr().out
    assert f"the best model is in {tmp_path / 'trials' / '1' / 'model'}" in first
    assert (tmp_path / "trials.png").read_bytes().startswith(b"\x89PNG")
    tune.main(command)
    assert len(started) == 2
    assert first.endswith(capsys.readouterr().out)
