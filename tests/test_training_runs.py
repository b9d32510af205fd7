"""Whole runs of the workloads: their results, resumption after kills, several processes, logs and broken records."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import ROOT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_data import adult_line, typed_by_make, write_adult, write_digits
from training_runs import Runner

from headcount.data import fetch
from serving.exported.model import ExportedModel

README = (ROOT / "README.md").read_text()
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    one = Runner(tmp_path_factory.mktemp("runs"))
    yield one
    one.close()


@pytest.fixture(scope="module")
def census(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """The options of a census run of 60 steps."""
    folder = tmp_path_factory.mktemp("adult")
    train, test = write_adult(folder / "train", 1000, 1), write_adult(folder / "test", 300, 2)
    return ["--train-files", train, "--eval-files", test, "--train-steps", 60, "--eval-every", 30,
            "--checkpoint-every", 20, "--train-batch-size", 64, "--learning-rate", 0.02]  # fmt: skip


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """The options of a digits run of 60 steps with everything that is random."""
    folder = write_digits(tmp_path_factory.mktemp("mnist"))
    return ["--data-dir", folder, "--train-steps", 60, "--checkpoint-every", 20, "--train-batch-size", 32,
            "--nfil1", 4, "--nfil2", 6, "--batch-norm", "--augment", "crop,contrast", "--eval-every", 20]  # fmt: skip


def weights(job_dir: Path) -> dict[str, torch.Tensor]:
    """The weights of a run's newest checkpoint."""
    newest = max((job_dir / "checkpoints").glob("step-*.pt"))
    return dict(torch.load(newest, weights_only=True)["state"]["model"])


def contract(job_dir: Path) -> dict[str, object]:
    return dict(json.loads((job_dir / "model" / "contract.json").read_text()))


def test_a_census_run_ends_with_a_model_that_predicts(runner: Runner, census: list[object], tmp_path: Path) -> None:
    done = runner.run("census", "--job-dir", tmp_path, *census)
    assert done.code == 0, done.output
    log = done.lines()
    assert {line["severity"] for line in log} == {"INFO"}
    assert log[-1]["accuracy"] > 0.95
    assert log[-1]["auc"] > 0.98
    predictor = ExportedModel(tmp_path / "model")
    assert predictor.contract.metrics == {name: log[-1][name] for name in ("accuracy", "auc", "eval_loss")}
    person: dict[str, object] = {"age": 40, "education_num": 12, "capital_gain": 0, "capital_loss": 0}
    person |= {one.name: None for one in predictor.contract.inputs if one.kind == "category"}
    rich, poor = predictor.predict(
        [person | {"education": education, "hours_per_week": 58} for education in ("Masters", "HS-grad")]
    )
    assert isinstance(rich, dict)
    assert isinstance(poor, dict)
    assert list(rich) == ["class_ids", "classes", "logistic", "logits", "probabilities"]
    assert (rich["classes"], poor["classes"]) == ([">50K"], ["<=50K"])
    assert rich["logistic"] == pytest.approx(rich["probabilities"][1:])
    assert sum(rich["probabilities"]) == pytest.approx(1)


def test_tensorboard_shows_each_step_once_after_a_kill(runner: Runner, census: list[object], tmp_path: Path) -> None:
    options = ["--job-dir", tmp_path, *census, "--train-steps", 200, "--checkpoint-every", 90]
    assert runner.run("census", *options, kill=("torch.optim.Adam.step", 110)).code == -9
    assert runner.run("census", *options).code == 0
    events = EventAccumulator(str(tmp_path / "logs")).Reload()
    assert [one.step for one in events.Scalars("loss")] == [100, 200]
    assert [one.step for one in events.Scalars("accuracy")] == [30, 60, 90, 120, 150, 180, 200]


KILLS = [  # in order, in one folder: each run goes a little further than the one before
    ("torch.optim.Adam.step", 1),
    ("torch.optim.Adam.step", 18),
    ("os.fsync", 1),  # the first checkpoint is written, and has not got its name
    ("pathlib.Path.replace", 1),
    ("torch.optim.Adam.step", 23),  # after the first checkpoint
    ("os.fsync", 1),
    ("torch.save", 2),
    ("pathlib.Path.unlink", 1),  # an old checkpoint is removed
    ("serving.exported.program.io.BytesIO", 1),  # the model is exported
    ("serving.exported.model_contract.Contract.as_json", 1),  # the contract is written
]


@pytest.mark.parametrize("workload", ["census", "digits"])
def test_a_run_that_was_killed_again_and_again_ends_with_the_same_weights(
    runner: Runner, workload: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    options = request.getfixturevalue(workload)
    assert runner.run(workload, "--job-dir", tmp_path / "whole", *options).code == 0
    for kill in KILLS:
        killed = runner.run(workload, "--job-dir", tmp_path / "killed", *options, kill=kill)
        assert killed.code == -9, (kill, killed.output)
    assert not (tmp_path / "killed" / "model" / "contract.json").exists()
    last = runner.run(workload, "--job-dir", tmp_path / "killed", *options)
    assert last.code == 0
    assert "resumed after step" in last.output
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert contract(tmp_path / "whole") == contract(tmp_path / "killed")


def test_another_seed_makes_another_model(runner: Runner, digits: list[object], tmp_path: Path) -> None:
    for name, seed in (("first", 1), ("same", 1), ("other", 2)):
        trained = runner.run(
            "digits", "--job-dir", tmp_path / name, *digits, "--seed", seed, kill=("training.digits.export", 1)
        )
        assert trained.code == -9, trained.output
    first, same, other = (weights(tmp_path / name) for name in ("first", "same", "other"))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_a_changed_option_is_not_mixed_into_a_run(runner: Runner, census: list[object], tmp_path: Path) -> None:
    runner.run("census", "--job-dir", tmp_path, *census, kill=("torch.optim.Adam.step", 30))
    refused = runner.run("census", "--job-dir", tmp_path, *census, "--dropout", 0.3)
    assert refused.code == 2
    assert "dropout 0.1 is now 0.3" in refused.output
    assert "Traceback" not in refused.output
    again = runner.run(
        "census", "--job-dir", tmp_path, *census, "--dropout", 0.3, "--fresh", kill=("training.census.export", 1)
    )
    assert again.code == -9
    assert "step 60: accuracy" in again.output


def test_vertex_ai_names_the_folders(runner: Runner, census: list[object], tmp_path: Path) -> None:
    folders = {"AIP_MODEL_DIR": "a", "AIP_CHECKPOINT_DIR": "b", "AIP_TENSORBOARD_LOG_DIR": "c"}
    environment = {name: str(tmp_path / folder) for name, folder in folders.items()}
    assert runner.run("census", *census, "--job-dir", tmp_path / "unused", environment=environment).code == 0
    assert (tmp_path / "a" / "model.pt2").exists()
    assert len(list((tmp_path / "b").glob("step-*.pt"))) == 2
    assert list((tmp_path / "c").glob("events.*"))
    assert not (tmp_path / "unused").exists()


def test_a_trial_of_a_tuning_reports_its_accuracy(runner: Runner, digits: list[object], tmp_path: Path) -> None:
    metrics = tmp_path / "metrics" / "output.metrics"
    environment = {"CLOUD_ML_TRIAL_ID": "7", "CLOUD_ML_HP_METRIC_FILE": str(metrics)}
    tuned = [f"--{name}" for name in ("nfil1=4.0", "nfil2=6", "learning_rate=0.002", "train_batch_size=16")]
    assert runner.run("digits", "--job-dir", tmp_path / "job", *digits, *tuned, environment=environment).code == 0
    reported = json.loads(metrics.read_text().splitlines()[-1])
    assert float(reported["accuracy"]) == contract(tmp_path / "job")["metrics"]["accuracy"]  # type: ignore[index]
    assert (reported["trial"], reported["global_step"]) == ("7", "60")


def test_a_terminal_shows_a_bar_and_a_log_does_not(runner: Runner, census: list[object], tmp_path: Path) -> None:
    shown = runner.run("census", "--job-dir", tmp_path, *census, terminal=True)
    assert shown.code == 0, shown.output
    assert "/60 [" in shown.output
    assert "step 30: accuracy" in shown.output
    assert "{" not in shown.output


def test_broken_records_stop_a_run_or_are_counted(runner: Runner, census: list[object], tmp_path: Path) -> None:
    train = tmp_path / "train"
    shutil.copy(str(census[1]), train)
    with train.open("a") as file:
        file.write(adult_line(age="old") + "\n" + adult_line() + "\n" + "1, 2\n")
    options = ["--job-dir", tmp_path / "job", *census, "--train-files", train]
    refused = runner.run("census", *options)
    assert refused.code == 2
    assert f"{train}:1001: age is 'old', not a number of at least 0" in refused.output
    assert f"{train}:1003: it has 2 fields, not 15" in refused.output
    done = runner.run("census", *options, "--on-bad-record", "skip")
    assert done.code == 0, done.output
    assert [line["message"] for line in done.lines() if line["severity"] == "WARNING"] == [
        f"skipped {line}" for line in refused.output.splitlines()[1:]
    ]
    assert done.lines()[-1]["skipped"] == contract(tmp_path / "job")["origin"]["skipped"] == 2  # type: ignore[index]


def test_two_processes_train_the_same_model(runner: Runner, census: list[object], tmp_path: Path) -> None:
    options = ["--dropout", "0", *map(str, census)]
    assert runner.run("census", "--job-dir", tmp_path / "one", *options).code == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                "--log-dir", str(tmp_path / "log")]  # fmt: skip
    command = [*torchrun, "-m", "training.census", "--job-dir", str(tmp_path / "two"), *options]
    two = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert two.returncode == 0, two.stderr
    assert len([line for line in two.stdout.splitlines() if '"step": 60' in line]) == 1  # the chief alone logs
    one, other = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all(torch.allclose(one[name], other[name], atol=1e-3) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)  # there were two


def test_a_search_tries_architectures_and_resumes(runner: Runner, tmp_path: Path) -> None:
    folder = write_digits(tmp_path / "mnist")
    small = ["--data-dir", folder, "--trials", 3, "--trial-digits", 100, "--trial-steps", 4, "--holdout", 100,
             "--train-steps", 4, "--train-batch-size", 16, "--seed", 2]  # fmt: skip
    whole, killed = (["--job-dir", tmp_path / name, "--method", "controller", *small] for name in ("whole", "killed"))
    assert runner.run("search", *whole).code == 0
    assert runner.run("search", *killed, kill=("torch.save", 3)).code == -9
    done = runner.run("search", *killed)
    assert done.code == 0, done.output
    assert "resumed after step 2 of 3" in done.output
    assert contract(tmp_path / "whole") == contract(tmp_path / "killed")
    assert len(contract(tmp_path / "whole")["origin"]["trial_accuracies"]) == 3  # type: ignore[index]


def test_the_experiments_print_tables_and_a_plot(runner: Runner, tmp_path: Path) -> None:
    folder = write_digits(tmp_path / "mnist")
    digits = ["--", "--data-dir", folder, "--train-steps", 5, "--nfil1", 2, "--nfil2", 2, "--train-batch-size", 50]
    for name, variants in (("augmentation", 5), ("transfer", 2)):
        done = runner.run("experiments", name, "--job-dir", tmp_path / name, "--seeds", 1, *digits)
        assert done.code == 0, done.output
        rows = [line for line in done.output.splitlines() if line.startswith("| ")]
        assert len(rows) == 1 + variants, done.output
    search = ["--", "--data-dir", folder, "--trials", 2, "--trial-digits", 50, "--trial-steps", 2, "--holdout", 100,
              "--train-steps", 2]  # fmt: skip
    done = runner.run("experiments", "search", "--job-dir", tmp_path / "search", "--seeds", 1, *search)
    assert done.code == 0, done.output
    assert (tmp_path / "search" / "search.png").read_bytes().startswith(b"\x89PNG")


def test_a_learning_curve_has_the_accuracy_of_each_evaluation(
    runner: Runner, census: list[object], tmp_path: Path
) -> None:
    longer = ["--", *census, "--train-steps", 210]
    done = runner.run("experiments", "census", "--job-dir", tmp_path, "--seeds", 1, *longer)
    assert done.code == 0, done.output
    log = [json.loads(line) for line in done.output.splitlines() if line.startswith("{")]
    at = {one["step"]: one["accuracy"] for one in log if "step" in one and "accuracy" in one}
    assert list(at) == [100, 200, 210]
    assert "| steps | 100 | 200 |" in done.output
    assert f"| wide and deep | {at[100] * 100:.1f} | {at[200] * 100:.1f} |" in done.output
    assert (tmp_path / "census.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.needs("adult", "mnist")
def test_the_commands_of_the_readme_run(runner: Runner, tmp_path: Path) -> None:
    table = README[README.index("| the guide says |") :].partition("\n\n")[0]
    (fetched,) = re.findall(r"`\.venv/bin/python -m (headcount\.data [^`]*)`", table)
    paths = subprocess.run([sys.executable, "-m", *fetched.split()], check=True, capture_output=True, text=True).stdout
    assert [Path(path).parent.name for path in paths.split()] == ["adult"] * 2 + ["mnist"] * 4
    commands = re.findall(r"`make (train [^`]*)`", table)
    assert len(commands) == 2
    for command in commands:
        module, *options = typed_by_make(*shlex.split(command), f"RUN={tmp_path / 'job'}")
        done = runner.run(module.removeprefix("training."), *options, "--fresh", "--train-steps", 2)
        assert done.code == 0, done.output
        assert (tmp_path / "job" / "model" / "contract.json").exists()


@pytest.mark.needs("adult")
def test_census_reaches_its_figures_on_the_real_table(runner: Runner, tmp_path: Path) -> None:
    files = ["--train-files", fetch("adult.data"), "--eval-files", fetch("adult.test")]
    done = runner.run("census", "--job-dir", tmp_path, "--train-steps", 1000, *files)
    assert done.code == 0, done.output
    assert done.lines()[-1]["accuracy"] >= 0.85
    assert done.lines()[-1]["auc"] >= 0.90


@pytest.mark.needs("mnist")
def test_digits_learn_from_mnist(runner: Runner, tmp_path: Path) -> None:
    """The whole training, to 0.99 and more, takes minutes: training/README.md has its figures."""
    folder = fetch("train-images-idx3-ubyte.gz").parent
    done = runner.run("digits", "--job-dir", tmp_path, "--data-dir", folder, "--train-steps", 200, "--batch-norm")
    assert done.code == 0, done.output
    assert done.lines()[-1]["accuracy"] >= 0.975
