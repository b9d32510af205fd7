"""Training under Pulumi's mocks: the jobs of a stack, their rights and data, and the releases with their models."""

import json
from pathlib import Path
from typing import Any

import pulumi
import pytest
import yaml
from google.cloud.aiplatform_v1.types import StudySpec
from helpers import ROOT
from test_infra_program import KEY, PINNED, REPOSITORY, Run
from test_infra_program import run as run  # the fixture

from headcount.data import SETS
from infra import training
from infra.nested_settings import Job
from infra.settings import read
from pulumi_vertex.jobs.tuning_job import check_study, study_spec

MODELS = "gs://my-project-hc-models-dev"
CENSUS = {"census": {"workload": "census", "args": ["--train-steps=9"]}}
SERVED = {"main": {"image": "build", "model": "training/census", "traffic": 100}}
ACCOUNT = "serviceAccount:hc-training-dev@my-project.iam.gserviceaccount.com"


def test_a_job_trains_on_its_data_and_its_model_is_served(run: Run) -> None:
    program = run("dev", training=CENSUS, releases=SERVED)
    asked = program.recorder
    job = asked.one("index:CustomJob")
    objects = {one["name"]: one["bucket"] for one in asked.inputs("bucketObject:BucketObject")}
    assert set(objects.values()) == {"my-project-hc-models-dev"}
    data, test = sorted(objects)  # Pulumi registers them in any order
    assert job["args"] == [
        "training.census", f"--train-files={MODELS}/{data}", f"--eval-files={MODELS}/{test}", "--train-steps=9"
    ]  # fmt: skip
    assert job["image"].startswith(f"{REPOSITORY}/headcount-training@sha256:")
    assert job["serviceAccount"] == ACCOUNT.partition(":")[2]
    assert job["tensorboard"].endswith("/tensorboards/7")
    assert job["labels"] == {"project": "headcount", "stack": "dev"}
    version = asked.one("ModelVersion")
    assert version["artifactUri"] == f"{job['baseOutputDirectory']}/0123/model" == program.outputs["trained"]["census"]
    assert job["baseOutputDirectory"] == f"{MODELS}/training/census"


def test_up_ends_with_a_line_that_predicts(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(pulumi.log, "info", said.append)
    outputs = run("dev", training=CENSUS, releases=SERVED).outputs
    assert outputs["predict"] == "headcount predict --stack dev --json-instances instances.json"
    assert [line.strip() for line in said.pop().splitlines()][:2] == ["Predict with", outputs["predict"]]
    assert not {"count", "curl"} & set(outputs)


def test_a_job_starts_when_its_data_and_rights_are_there(run: Run) -> None:
    needed = run("dev", training=CENSUS).request("index:CustomJob").dependencies
    for name in ("training-reads-bucket", "training-writes-outputs", "training-reports", "images-agent"):
        assert any(urn.endswith(f"::{name}") for urn in needed), name
    assert len([urn for urn in needed if "BucketObject" in urn]) == 2


def test_the_account_has_the_rights_of_a_job_and_no_others(run: Run) -> None:
    asked = run("dev", training=CENSUS).recorder
    grants = [one.inputs for one in asked.asked if one.inputs.get("member") == ACCOUNT]
    on_bucket = {one["role"]: one.get("condition", {}).get("expression") for one in grants if "bucket" in one}
    assert on_bucket == {
        "roles/storage.objectViewer": None,
        "roles/storage.objectUser": (
            'resource.name.startsWith("projects/_/buckets/my-project-hc-models-dev/objects/training/")'
        ),
    }
    (reports,) = [one for one in grants if "bucket" not in one]
    role = asked.one("IAMCustomRole")
    assert reports["role"] == f"projects/my-project/roles/{role['roleId']}"
    services = ("aiplatform.tensorboard", "logging.logEntries.create")
    assert all(one.startswith(services) and "delete" not in one.lower() for one in role["permissions"])


def test_the_data_s_folder_is_named_after_its_content(tmp_path: Path) -> None:
    def hashed(**files: str) -> str:
        for name, content in files.items():
            (tmp_path / name).write_text(content)
        return training.content_hash([tmp_path / name for name in files])

    assert hashed(a="x", b="y") == hashed(a="x", b="y")
    assert len({hashed(a="x", b="y"), hashed(a="y", b="y"), hashed(b="y", a="x"), hashed(a="xb", b="y")}) == 4


def test_the_images_share_the_layer_of_torch(run: Run) -> None:
    asked = run("dev", training=CENSUS).recorder
    serving, training_image = sorted(asked.inputs("docker-build:index:Image"), key=lambda one: "target" in one)
    assert (serving.get("target"), training_image["target"]) == (None, "training")
    assert serving["tags"] == [f"{REPOSITORY}/headcount:0123456789abcdef"]
    assert training_image["tags"] == [f"{REPOSITORY}/headcount-training:0123456789abcdef"]
    shared = {name: serving["buildArgs"][name] for name in ("BASE", "TORCH", "ACCELERATOR")}
    assert training_image["buildArgs"] == {**shared, "SOURCES": "0123456789abcdef"}
    gpu = {"census": {"workload": "census", "accelerator": "NVIDIA_TESLA_T4", "machineType": "n1-standard-8"}}
    asked = run("dev", training=gpu).recorder
    (built,) = [one for one in asked.inputs("docker-build:index:Image") if "target" in one]
    assert (built["buildArgs"]["ACCELERATOR"], built["buildArgs"]["TORCH"]) == ("cuda", "index")
    job = asked.one("index:CustomJob")
    assert (job["machineType"], job["acceleratorType"], job["acceleratorCount"]) == (
        "n1-standard-8", "NVIDIA_TESLA_T4", 1
    )  # fmt: skip


def test_a_tuning_is_the_study_of_the_yaml(run: Run) -> None:
    program = run("dev", training={"digits": {"workload": "digits", "tuning": True}})
    study = program.recorder.one("index:TuningJob")
    wanted = yaml.safe_load((ROOT / "training" / "digits_tuning.yaml").read_text())
    assert check_study(study) == []
    sent, said = (StudySpec.from_json(json.dumps(spec)) for spec in (study_spec(study), wanted["studySpec"]))
    assert list(sent.metrics) == list(said.metrics)
    assert {one.parameter_id: one for one in sent.parameters} == {one.parameter_id: one for one in said.parameters}
    assert (study["maxTrials"], study["parallelTrials"]) == (wanted["maxTrialCount"], wanted["parallelTrialCount"])
    assert program.recorder.inputs("index:CustomJob") == []


def test_two_jobs_on_the_same_data_upload_it_once(run: Run) -> None:
    both = {name: {"workload": "census", "args": [f"--seed={seed}"]} for seed, name in enumerate(("one", "two"))}
    releases = {
        name: {"image": "build", "model": f"training/{name}", "traffic": share}
        for name, share in (("one", 90), ("two", 10))
    }
    asked = run("dev", training=both, releases=releases).recorder
    assert len(asked.inputs("bucketObject:BucketObject")) == 2
    uris = {one["aliases"][0]: one["artifactUri"] for one in asked.inputs("ModelVersion")}
    assert uris == {name: f"{MODELS}/training/{name}/0123/model" for name in both}


def test_a_key_encrypts_what_training_stores(run: Run) -> None:
    asked = run("dev", training=CENSUS, kmsKey=KEY).recorder
    assert asked.one("AiTensorboard")["encryptionSpec"] == {"kmsKeyName": KEY}
    assert asked.one("index:CustomJob")["encryptionKey"] == KEY


def test_without_the_setting_there_is_nothing_of_it(run: Run) -> None:
    program = run("dev")
    text = json.dumps([[one.typ, one.name, one.inputs] for one in program.recorder.asked])
    assert "raining" not in text.replace("training image", "")
    assert "ensorboard" not in text
    assert not {"trained", "tensorboard"} & set(program.outputs)


@pytest.mark.parametrize("workload", training.WORKLOADS)
def test_data_of_one_s_own_has_the_names_of_the_published_files(
    workload: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = training.WORKLOADS[workload]
    assert known.files == SETS[known.data]
    monkeypatch.setattr(training, "ROOT", tmp_path)
    job = Job.model_validate({"workload": workload, "data": "mine"})
    with pytest.raises(pulumi.RunError, match=f"not there: .*mine/{known.files[0]}"):
        training.data_files(job)
    (tmp_path / "mine").mkdir()
    for name in known.files:
        (tmp_path / "mine" / name).touch()
    assert training.data_files(job) == [tmp_path / "mine" / name for name in known.files]


@pytest.mark.parametrize(
    ("settings", "said", "repair"),
    [
        (
            {"training": {"census": {"workload": "census", "tuning": True}}},
            "there is a tuning of digits only, not of census",
            "rm --path headcount:training.census.tuning",
        ),
        (
            {"training": {"a b": {"workload": "census"}}},
            "is no name for a job",
            "rm --path 'headcount:training.a b'",
        ),
        (
            {"training": {"census": {"workload": "sensus"}}},
            "headcount:training.census.workload (module of training/ that runs)",
            "set --path headcount:training.census.workload census",
        ),
        (
            {"training": {"census": {"workload": "census", "machinetype": "x"}}},
            "Did you mean machineType?",
            "rm --path headcount:training.census.machinetype",
        ),
        (
            {"releases": SERVED},
            "main serves training/census, and headcount:training has no job of that name",
            "set --path headcount:training.census.workload census",
        ),
        (
            {"training": CENSUS, "production": True, "releases": {}},
            "production builds and trains nothing",
            "rm headcount:training",
        ),
    ],
)
def test_wrong_settings_are_said_with_their_repair(settings: dict[str, Any], said: str, repair: str) -> None:
    config = {f"headcount:{key}": json.dumps(value) for key, value in settings.items()}
    with pytest.raises(pulumi.RunError) as caught:
        read({"gcp:project": "my-project", "gcp:region": "europe-west4", **config}, "dev")
    assert said in str(caught.value)
    assert f"pulumi config {repair} -s dev" in str(caught.value)


def test_a_pinned_release_serves_a_job_s_model(run: Run) -> None:
    releases = {"main": {"image": PINNED, "model": "training/census", "traffic": 100}}
    program = run("dev", training=CENSUS, releases=releases)
    assert program.recorder.one("ModelVersion")["artifactUri"].startswith(f"{MODELS}/training/census/")
    assert [one["target"] for one in program.recorder.inputs("docker-build:index:Image")] == ["training"]
