"""The pipeline under Pulumi's mocks: its template, data and rights, its run and its schedule."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pulumi
import pytest
import yaml
from test_infra_program import KEY, PINNED, REPOSITORY, Program
from test_infra_program import run as run_program

from infra import pipelines
from infra.settings import read
from pulumi_vertex.pipelines import PipelineJobType, ScheduleType
from pulumi_vertex.pipelines.template import parsed
from pulumi_vertex.wire import unwrapped

__all__ = ["run_program"]  # a fixture
MODELS = "gs://my-project-hc-models-dev"
ACCOUNT = "serviceAccount:hc-pipeline-dev@my-project.iam.gserviceaccount.com"
NIGHTLY = {"cron": "0 3 * * 1-5", "timeZone": "Europe/Amsterdam"}

Run = Callable[..., Program]


@pytest.fixture
def run(run_program: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """The program, in which a template only names its images."""
    monkeypatch.setattr(pipelines, "data_files", lambda job: [tmp_path / "adult.data", tmp_path / "adult.test"])
    monkeypatch.setattr(pipelines, "compiled", lambda *images: "\n".join(["template", *images]))
    return run_program


def test_the_template_is_compiled_for_the_images_and_kept_under_its_content(run: Run) -> None:
    program = run("dev", pipeline=NIGHTLY)
    template = program.recorder.one("BucketObject", "template")
    title, training, serving = template["source"].text.splitlines()
    assert (title, training.partition("@sha256:")[0]) == ("template", f"{REPOSITORY}/headcount-training")
    assert serving.partition("@sha256:")[0] == f"{REPOSITORY}/headcount"
    assert template["bucket"] == "my-project-hc-models-dev"
    assert program.outputs["pipelineTemplate"] == f"{MODELS}/{template['name']}"
    other = run("dev", pipeline=NIGHTLY, releases={"main": {"image": PINNED, "traffic": 100}})
    assert other.recorder.one("BucketObject", "template")["name"] != template["name"]


def test_a_schedule_runs_the_template_on_data_of_the_bucket_and_registers_in_a_model_of_its_own(run: Run) -> None:
    program = run("dev", pipeline=NIGHTLY | {"parameters": {"train_steps": 5}, "paused": True, "maxRunCount": 3})
    asked = program.recorder
    schedule = asked.one("index:Schedule")
    assert asked.inputs("index:PipelineJob") == []
    assert {name: schedule[name] for name in ("cron", "timeZone", "paused", "maxConcurrentRuns", "maxRunCount")} == {
        **NIGHTLY, "paused": True, "maxConcurrentRuns": 1, "maxRunCount": 3
    }  # fmt: skip
    assert not {"startTime", "endTime"} & set(schedule)
    data = {one["name"] for one in asked.inputs("BucketObject") if one["name"].startswith("data/")}
    (folder,) = {name.rpartition("/")[0] for name in data}
    model = "projects/my-project/locations/europe-west4/models/headcount-pipeline-dev"
    assert schedule["parameters"] == {"data": f"{MODELS}/{folder}", "registry": model, "train_steps": 5}
    assert program.outputs["pipelineModel"] == model
    assert schedule["templateUri"] == program.outputs["pipelineTemplate"]
    assert schedule["parameters"] == program.outputs["pipelineParameters"]
    assert schedule["serviceAccount"] == program.outputs["pipelineAccount"]
    assert schedule["pipelineRoot"] == program.outputs["pipelineRoot"]
    assert schedule["pipelineRoot"] == f"{MODELS}/pipelines"
    assert schedule["serviceAccount"] == ACCOUNT.partition(":")[2]
    assert schedule["labels"] == {"project": "headcount", "stack": "dev"}
    assert ScheduleType().check(unwrapped(schedule)) == []
    versions = asked.inputs("ModelVersion")
    assert all("default" not in one["aliases"] and "headcount-pipeline" not in one["modelId"] for one in versions)


def test_one_run_waits_for_all_that_it_needs(run: Run) -> None:
    program = run("dev", pipeline={"run": True}, kmsKey=KEY)
    job = program.recorder.one("index:PipelineJob")
    assert PipelineJobType().check(unwrapped(job)) == []
    assert job["encryptionKey"] == KEY
    assert program.recorder.inputs("index:Schedule") == []
    needed = program.request("index:PipelineJob").dependencies
    for name in ("pipeline-reads-bucket", "pipeline-writes-outputs", "pipeline-reports", "images-agent", "template"):
        assert any(urn.endswith(f"::{name}") for urn in needed), name


def test_the_account_has_the_rights_of_a_pipeline_and_no_others(run: Run) -> None:
    asked = run("dev", pipeline=NIGHTLY).recorder
    grants = [one.inputs for one in asked.asked if one.inputs.get("member") == ACCOUNT]
    on_bucket = {one["role"]: one.get("condition", {}).get("expression") for one in grants if "bucket" in one}
    assert on_bucket == {
        "roles/storage.objectViewer": None,
        "roles/storage.objectUser": (
            'resource.name.startsWith("projects/_/buckets/my-project-hc-models-dev/objects/pipelines/")'
        ),
    }
    (works,) = [one for one in grants if "bucket" not in one]
    role = asked.one("IAMCustomRole")
    assert works["role"] == f"projects/my-project/roles/{role['roleId']}"
    assert not [one for one in role["permissions"] if "delete" in one.lower() or ".endpoints." in one]


def test_the_pipeline_runs_in_the_image_of_the_jobs_where_there_are_jobs(run: Run) -> None:
    jobs = {"census": {"workload": "census"}}
    images = run("dev", pipeline=NIGHTLY, training=jobs).recorder.inputs("docker-build:index:Image")
    assert sorted(one.get("target", "") for one in images) == ["", "training"]
    images = run("dev", pipeline=NIGHTLY).recorder.inputs("docker-build:index:Image")
    assert sorted(one.get("target", "") for one in images) == ["", "training"]


def test_without_the_setting_there_is_nothing_of_it(run: Run) -> None:
    program = run("dev")
    assert "ipeline" not in json.dumps([[one.typ, one.name, one.inputs] for one in program.recorder.asked])
    assert not {"pipelineTemplate", "pipelineModel"} & set(program.outputs)


@pytest.mark.parametrize(
    ("settings", "said", "repair"),
    [
        ({"pipeline": {"cronn": "x"}}, "Did you mean cron?", "rm --path headcount:pipeline.cronn"),
        (
            {"pipeline": {"paused": True, "endTime": "2030-01-01T00:00:00Z"}},
            "paused and endTime has no meaning without cron",
            "set --path headcount:pipeline.cron '0 3 * * *'",
        ),
        ({"pipeline": {"run": "maybe"}}, "neither true nor false", "set headcount:pipeline.run true"),
        (
            {"pipeline": {}, "production": True, "releases": {}},
            "production builds and trains nothing",
            "rm headcount:pipeline",
        ),
        ({"pipeline": {}, "releases": {}}, "and there is none", "set --path headcount:releases.main.image build"),
    ],
)
def test_wrong_settings_are_said_with_their_repair(settings: dict[str, Any], said: str, repair: str) -> None:
    config = {f"headcount:{key}": json.dumps(value) for key, value in settings.items()}
    with pytest.raises(pulumi.RunError) as caught:
        read({"gcp:project": "my-project", "gcp:region": "europe-west4", **config}, "dev")
    assert said in str(caught.value)
    assert f"pulumi config {repair} -s dev" in str(caught.value)


def test_the_program_compiles_the_census_pipeline_the_same_way_each_time() -> None:
    images = (f"{REPOSITORY}/headcount-training@{PINNED}", f"{REPOSITORY}/headcount@{PINNED}")
    text = pipelines.compiled(*images)
    spec = parsed(text)
    assert spec["pipelineInfo"]["name"] == "census"
    assert text.count(images[0]) > 3
    given = {"data": "gs://b/x", "registry": "projects/p/locations/l/models/m", "train_steps": 5}
    inputs = {"template": text, "pipelineRoot": "gs://b/x", "parameters": given}
    assert PipelineJobType().check(inputs) == [], "the parameters that the program gives are those of the pipeline"
    assert yaml.safe_load(text)["root"]["inputDefinitions"]["parameters"]["serving_image"]["defaultValue"] == images[1]


def test_a_pipeline_that_is_not_compiled_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 2, "", "pipelines: there is no kfp\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(pulumi.RunError, match=r"The pipeline was not compiled:\npipelines: there is no kfp$"):
        pipelines.compiled("a", "b")
