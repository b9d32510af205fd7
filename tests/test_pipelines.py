"""The steps of the census pipeline as functions, its registries, its template, and its command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from census_models import artifact, evaluation, model
from kfp import dsl
from training_data import adult_line, typed_by_make, write_adult

from infra import prediction
from sandbox.testing import LOCATION, RunningSandbox
from training.files import UsageError
from training.pipelines import components, registry, steps, template
from training.pipelines.__main__ import local_values, main
from training.pipelines.registry import ENDPOINT, Candidate, FolderRegistry, open_registry

IMAGES = ("--training-image", "host/training@sha256:1", "--serving-image", "host/serving@sha256:2")


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that is right about `evaluation`."""
    return model(tmp_path_factory.mktemp("models") / "good", 40)


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model(tmp_path_factory.mktemp("models") / "bad", 55)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return evaluation(tmp_path / "data", [30, 35, 45, 50, 60])


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("compiled") / "census.yaml"
    assert main(["compile", *IMAGES, "--output", str(file)]) == 0
    return file


# ------------------------------------------------------------------------------------------------------------ steps


def test_download_takes_a_folder_or_what_is_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_adult(tmp_path / "adult.data", 3, 0)
    with pytest.raises(UsageError, match=r"has no adult\.test"):
        components.download.python_func(str(tmp_path), artifact(dsl.Dataset, tmp_path / "raw"))
    write_adult(tmp_path / "adult.test", 2, 1)
    components.download.python_func(str(tmp_path), artifact(dsl.Dataset, tmp_path / "raw"))
    assert (tmp_path / "raw" / "adult.test").read_text() == (tmp_path / "adult.test").read_text()
    monkeypatch.setattr("training.files.GCS", tmp_path.parent)
    said = components.download.python_func(f"gs://{tmp_path.name}/", artifact(dsl.Dataset, tmp_path / "mounted"))
    assert "adult.data" in said
    assert (tmp_path / "mounted" / "adult.data").exists()


def test_cleaning_drops_what_is_broken_repeated_or_leaked(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    alone = adult_line(age="20")
    (raw / "adult.data").write_text(
        "\n".join(
            ["|1x3 Cross validator", "", alone, alone, adult_line(age="21", occupation="?", workclass="NA"),
             adult_line(age="old"), adult_line(">50K", age="22"), *(adult_line(age=str(40 + n)) for n in range(30))]
        )
    )  # fmt: skip
    (raw / "adult.test").write_text(f"{adult_line('>50K.', age='22')}\n  {adult_line('<=50K.', age='99')}  \n")
    report = artifact(dsl.Metrics, tmp_path / "report")
    said = components.clean.python_func(
        artifact(dsl.Dataset, raw), 0.05, artifact(dsl.Dataset, tmp_path / "cleaned"), report
    )
    assert report.metadata == {
        "records": 37, "broken": 1, "duplicates": 1, "leaks": 1, "missing_values": 2, "train": 32, "eval": 2,
    }  # fmt: skip
    train = (tmp_path / "cleaned" / "train.csv").read_text().splitlines()
    assert train[:2] == [
        alone.replace(", ", ","),
        adult_line(age="21", occupation="?", workclass="?").replace(", ", ","),
    ]
    assert (tmp_path / "cleaned" / "eval.csv").read_text().splitlines()[0].endswith(",>50K")
    assert said == "32 and 2 records; dropped: 1 broken, 1 repeated, 1 in both files"


def test_another_table_is_not_cleaned_away(tmp_path: Path) -> None:
    for name in ("adult.data", "adult.test"):
        (tmp_path / name).write_text("a,b\n1,2\n")
    arguments = artifact(dsl.Dataset, tmp_path / "cleaned"), artifact(dsl.Metrics, tmp_path / "report")
    with pytest.raises(UsageError, match=r"2 of 2 records of adult\.data are broken.*line 1: it has 2 fields, not 15"):
        components.clean.python_func(artifact(dsl.Dataset, tmp_path), 0.05, *arguments)


def test_a_model_is_evaluated_as_it_is_served(tmp_path: Path, bad: Path, data: Path) -> None:
    metrics, classes = (artifact(kind, tmp_path / "m") for kind in (dsl.Metrics, dsl.ClassificationMetrics))
    components.evaluate.python_func(artifact(dsl.Model, bad), artifact(dsl.Dataset, data), metrics, classes)
    assert metrics.metadata == {"accuracy": 0.6, "auc": 1.0}
    assert [row["row"] for row in classes.metadata["confusionMatrix"]["rows"]] == [[2, 0], [2, 1]]


def test_inference_writes_a_line_for_each_record(tmp_path: Path, good: Path, data: Path) -> None:
    said = components.infer.python_func(
        artifact(dsl.Model, good), artifact(dsl.Dataset, data), artifact(dsl.Dataset, tmp_path / "out")
    )
    lines = [json.loads(line) for line in (tmp_path / "out" / steps.PREDICTIONS).read_text().splitlines()]
    assert [line["prediction"]["classes"] for line in lines] == [["<=50K"]] * 2 + [[">50K"]] * 3
    assert lines[0]["instance"]["hours_per_week"] == 30
    assert "income_bracket" not in lines[0]["instance"]
    assert said == "5 predictions, 3 of them >50K"


def compare(one: Path, data: Path, where: object, accuracy: float, job: str = "a-run") -> Any:
    metrics = artifact(dsl.Metrics, data, accuracy=accuracy)
    return components.compare.python_func(
        artifact(dsl.Model, one), artifact(dsl.Dataset, data), metrics, str(where), job
    )


def register(one: Path, data: Path, where: object, champion: str, job: str = "a-run") -> str:
    metrics = artifact(dsl.Metrics, data, accuracy=0.75)
    said: str = components.register.python_func(
        artifact(dsl.Model, one), artifact(dsl.Dataset, data), metrics, champion, str(where), "host/serving", job
    )
    return said


def test_the_first_model_is_registered_and_then_only_better_ones(
    tmp_path: Path, good: Path, bad: Path, data: Path
) -> None:
    where = tmp_path / "registry"
    assert compare(bad, data, where, 0.6) == (True, "", "the registry has no version yet")
    assert register(bad, data, where, "") == "version 1 is the default now"
    assert compare(bad, data, where, 0.6)[0] is False  # the same model
    better, champion, why = compare(good, data, where, 1.0)
    assert (better, champion) == (True, "1")
    assert why == "better: accuracy 1.00000, and version 1, the default, has 0.60000 on the same data"
    register(good, data, where, "1")
    better, champion, why = compare(bad, data, where, 0.6)
    assert (better, champion) == (False, "2")
    assert "not registered: accuracy 0.60000, and version 2, the default, has 1.00000" in why
    content = json.loads((where / "registry.json").read_text())
    assert content["aliases"] == {"default": "2"}
    assert content["versions"]["1"]["evaluation"]["accuracy"] == 0.75
    assert (where / "versions" / "2" / "model.pt2").read_bytes() == (good / "model.pt2").read_bytes()


def test_the_champion_is_measured_again_on_the_data_of_this_run(tmp_path: Path, good: Path, bad: Path) -> None:
    """On these records the champion is worse than what was noted about it."""
    register(good, evaluation(tmp_path / "easy", [30, 50]), tmp_path / "registry", "")
    hard = evaluation(tmp_path / "hard", [41, 42, 60])
    (hard / "eval.csv").write_text((hard / "eval.csv").read_text().replace(">50K", "<=50K", 2))
    better, _, why = compare(bad, hard, tmp_path / "registry", 1.0)
    assert better
    assert "has 0.33333" in why


def test_a_default_that_changed_after_the_comparison_is_kept(tmp_path: Path, good: Path, bad: Path, data: Path) -> None:
    register(good, data, tmp_path, "")
    with pytest.raises(UsageError, match="default version is 1 now and was absent"):
        register(bad, data, tmp_path, "")
    assert not (tmp_path / "versions" / "2").exists()


def test_a_killed_registration_leaves_the_registry_as_it_was(
    tmp_path: Path, good: Path, bad: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(good, data, tmp_path, "")
    monkeypatch.setattr(FolderRegistry, "_write", lambda self, content: sys.exit("killed"))
    with pytest.raises(SystemExit):
        register(bad, data, tmp_path, "1")
    monkeypatch.undo()
    default = open_registry(str(tmp_path), "").default()
    assert default
    assert default.name == "1"
    assert register(bad, data, tmp_path, "1") == "version 2 is the default now"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "is not JSON"),
        ("[]", "has no objects"),
        ('{"versions": {}, "aliases": {"default": "3"}}', "'3', which is"),
    ],
)
def test_a_registry_that_cannot_be_read_is_named(tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / "registry.json").write_text(content)
    with pytest.raises(UsageError, match=says):
        open_registry(str(tmp_path), "").default()


def test_a_registry_must_be_named_unless_the_job_is_on_vertex_ai() -> None:
    with pytest.raises(UsageError, match="no registry is named"):
        open_registry("", "census-2026-01-01")
    with pytest.raises(UsageError, match="write projects/PROJECT/locations/REGION/models/ID"):
        open_registry("projects/p/models/7", "")


@pytest.fixture(scope="module")
def sandbox() -> Iterator[RunningSandbox]:
    with RunningSandbox() as running:
        yield running
        assert running.violations() == []


@pytest.fixture
def vertex(sandbox: RunningSandbox, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a job of Vertex AI, which the sandbox stands for."""
    monkeypatch.setenv(ENDPOINT, f"{sandbox.url}/")
    monkeypatch.setattr("training.pipelines.registry.POLL_SECONDS", 0.05)
    return f"{LOCATION}/pipelineJobs/a-job"


def test_a_better_model_becomes_the_default_in_the_model_registry(
    sandbox: RunningSandbox, vertex: str, good: Path, bad: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.files.GCS", Path("/"))
    for one, accuracy, number in ((bad, 0.6, 1), (good, 1.0, 2)):
        better, champion, why = steps.compare(one, data, {"accuracy": accuracy}, "", vertex)
        assert (better, champion) == (True, "" if number == 1 else "1"), why
        said = steps.register(
            one, f"gs:/{one}", data, {"accuracy": accuracy}, champion, "", f"host/serving@sha256:{'0' * 64}", vertex
        )
        assert said == f"version {number} is the default now"
    assert steps.compare(good, data, {"accuracy": 1.0}, "", vertex).summary == "version 2, the default, is this model"
    better, _, why = steps.compare(bad, data, {"accuracy": 0.6}, f"{LOCATION}/models/census", "")
    assert (better, "has 1.00000 on the same data" in why) == (False, True)
    found = sandbox.do("GET", "models/census@2")
    assert found["versionAliases"] == ["default"]
    assert found["artifactUri"] == f"gs:/{good}"
    assert found["labels"]["accuracy"] == "1_00000"
    assert found["containerSpec"]["predictRoute"] == "/predictions/people"


def test_a_refused_registration_says_what_vertex_ai_said(vertex: str, good: Path, data: Path) -> None:
    candidate = Candidate(good, "gs://b/m", "0" * 12, {}, "0" * 64, "", "")
    with pytest.raises(UsageError, match=r"answers 400: .*image_uri is not set"):
        open_registry(f"{LOCATION}/models/other", "").register(candidate)


def test_the_serving_container_is_declared_as_infra_declares_it() -> None:
    assert (registry.PREDICT_ROUTE, registry.HEALTH_ROUTE) == (prediction.PREDICT_ROUTE, prediction.HEALTH_ROUTE)
    assert f"{prediction.DEPLOYMENT_TIMEOUT_SECONDS}s" == registry.DEPLOYMENT_TIMEOUT


# --------------------------------------------------------------------------------------------------------- template


def test_the_template_is_the_same_in_each_process(compiled: Path, tmp_path: Path) -> None:
    again = tmp_path / "made" / "again.yaml"
    command = [sys.executable, "-m", "training.pipelines", "compile", *IMAGES, "--output", str(again)]
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True)
    assert done.stdout == f"{again}\n"
    assert again.read_bytes() == compiled.read_bytes()
    assert [file.name for file in again.parent.iterdir()] == ["again.yaml"]


def test_the_template_has_the_images_and_the_parameters(compiled: Path) -> None:
    spec = template.load(compiled)
    assert template.images(spec) == ["host/training@sha256:1"]
    assert list(template.tasks(spec)) == ["download", "clean", "train", "evaluate", "infer", "compare", "register"]
    document = yaml.safe_load(compiled.read_text())
    defaults = {name: one["defaultValue"] for name, one in document["root"]["inputDefinitions"]["parameters"].items()}
    assert defaults == {
        "data": "", "max_dropped": 0.05, "train_steps": 2000.0, "seed": 0.0, "registry": "",
        "serving_image": "host/serving@sha256:2",
    }  # fmt: skip
    uncached = [name for name, task in document["root"]["dag"]["tasks"].items() if not task.get("cachingOptions", True)]
    assert uncached == ["compare"]
    assert "pip install" not in compiled.read_text()


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ("- 1\n- 2\n", "has no object at its top"),
        ("{a: [", "is not YAML"),
        ("", "has no object at its top"),
        ("apiVersion: v1\nkind: Pod\n", "apiVersion"),
        ("pipelineInfo: {name: a}\nschemaVersion: 2.1.0\n", "tasks"),
    ],
)
def test_a_file_that_is_no_template_is_refused(
    tmp_path: Path, changed: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other.yaml").write_text(changed)
    with pytest.raises(UsageError, match=f"other.yaml is not a compiled pipeline.*{says}"):
        main(["run", "--template", str(tmp_path / "other.yaml"), "--root", str(tmp_path)])


def test_a_template_with_a_field_that_kfp_lacks_is_refused(compiled: Path, tmp_path: Path) -> None:
    document = yaml.safe_load(compiled.read_text())
    document["deploymentSpec"]["executors"]["exec-train"]["container"]["images"] = "x"
    (tmp_path / "changed.yaml").write_text(yaml.safe_dump(document))
    with pytest.raises(UsageError, match="images"):
        template.load(tmp_path / "changed.yaml")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("train_step=5", "no parameter train_step. Do you mean train_steps"),
        ("colour=red", "no parameter colour. It has: data, max_dropped"),
        ("train_steps", "write --param NAME=VALUE"),
        ("train_steps=five", "'five', and has to be an integer"),
        ("train_steps=1.5", "has to be an integer"),
        ("train_steps=true", "has to be an integer"),
        ("max_dropped=much", "has to be a number"),
    ],
)
def test_a_wrong_parameter_is_named(compiled: Path, given: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        template.arguments(template.load(compiled), [given])


def test_parameters_have_their_types(compiled: Path) -> None:
    spec = template.load(compiled)
    assert template.arguments(spec, ["train_steps=7", "max_dropped=0.5", "data=gs://b/a=b"]) == {
        "train_steps": 7, "max_dropped": 0.5, "data": "gs://b/a=b",
    }  # fmt: skip
    with pytest.raises(UsageError, match="given twice"):
        template.arguments(spec, ["seed=1", "seed=2"])


def test_bad_input_ends_with_2_and_a_sentence(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "training.pipelines", "run", "--root", str(tmp_path), "--param", "train_step=5"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("pipelines: census has no parameter train_step. Do you mean train_steps?")
    assert done.stderr.count("\n") == 1


def test_data_counts_by_its_content(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "adult.data").write_text("one")
    first = local_values({"data": str(folder)}, tmp_path / "root")["data"]
    assert (Path(first) / "adult.data").read_text() == "one"
    assert local_values({"data": str(folder)}, tmp_path / "root")["data"] == first
    (folder / "adult.data").write_text("two")
    assert local_values({"data": str(folder)}, tmp_path / "root")["data"] != first
    assert local_values({"data": "gs://b/x"}, tmp_path / "root")["data"] == "gs://b/x"
    with pytest.raises(UsageError, match="is not a folder"):
        local_values({"data": str(tmp_path / "absent")}, tmp_path / "root")


def test_the_registry_is_a_folder_unless_one_is_named(tmp_path: Path) -> None:
    assert local_values({}, tmp_path) == {"registry": str(tmp_path / "registry")}
    named = {"registry": f"{LOCATION}/models/census"}
    assert local_values(named, tmp_path) == named


def test_make_runs_and_compiles_the_pipeline() -> None:
    assert typed_by_make("pipeline", "ARGS=--param seed=1") == [
        "training.pipelines", "run", "--root", "runs/pipelines", "--param", "seed=1",
    ]  # fmt: skip
    assert typed_by_make("pipeline-compile") == ["training.pipelines", "compile"]
