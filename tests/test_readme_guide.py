"""The README's table for those who come from an AI Platform guide: each command on its right side is typed here.

What needs Google, Docker or Pulumi's engine runs in the tests that ELSEWHERE names.
"""

from __future__ import annotations

import functools
import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import exported_models
import pipeline_templates
import pytest
import yaml
from google.auth.credentials import AnonymousCredentials
from google.cloud import storage
from helpers import ROOT
from pytest_httpserver import HTTPServer
from sandbox_jobs import create, job, pool, stubbed
from typer.testing import CliRunner
from werkzeug import Request, Response

from headcount import batch_command, endpoint, jobs, register_command
from headcount.cli import app
from sandbox.testing import RunningSandbox

README = (ROOT / "README.md").read_text()
TABLE = README[README.index("| the guide says |") :].partition("\n\n")[0]
RIGHT = [line.rstrip(" |").rpartition(" | ")[2] for line in TABLE.splitlines()[2:]]
VERBS = ("make ", "headcount ", "pulumi ", "gcloud ", ".venv/bin/")
TYPED = [text for cell in RIGHT for text in re.findall(r"`([^`]+)`", cell) if text.startswith(VERBS)]
ELSEWHERE = {
    r"pulumi (up|destroy)( -s dev)?": "tests/test_engine_infra.py",
    r"make (serve|up)": "tests/test_launcher.py and tests/test_engine_infra.py",
    r"make (deploy|train|tune).*|make train": "tests/test_laptop.py, test_training_runs.py and test_training_tune.py",
    r"make pipeline(-compile)?": "tests/test_pipelines.py and test_pipelines_runs.py",
    r"\.venv/bin/python -m headcount\.data .*": "tests/test_training_runs.py",
    r"gcloud storage .*": "nowhere, because it needs Google",
}


def test_every_command_is_typed_by_a_test() -> None:
    here = {line for line in TYPED if line.startswith("headcount ")} | {"make tensorboard"}
    assert len(here) >= 10
    left = [line for line in TYPED if line not in here and not any(re.fullmatch(one, line) for one in ELSEWHERE)]
    assert not left
    assert not [one for one in ELSEWHERE if not any(re.fullmatch(one, line) for line in TYPED)]


@pytest.mark.parametrize(
    "said",
    [
        "gsutil mb", "curl -O", "gsutil cp adult.data", "gsutil ls -r", "local train", "tensorboard --logdir",
        "local predict --model-dir", "--scale-tier=BASIC_GPU", "jobs stream-logs", "models create", "versions create",
        "Upload pipeline", "Create run", "Create experiment", "list_runs", "compiler",
        "versions delete", "predict --json-instances", "--config hptuning_config.yaml", "dsl-compile",
    ],
)  # fmt: skip
def test_the_table_has_each_step_of_the_guides(said: str) -> None:
    assert [line for line in TABLE.splitlines() if said in line]


@functools.cache
def pipeline() -> str:
    return yaml.safe_dump(pipeline_templates.optional())


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("Pulumi.yaml", "Pulumi.dev.yaml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "picture.jpg").write_bytes(b"\xff\xd8picture")
    (tmp_path / "instances.json").write_text('{"a": 1, "b": 2, "day": "mon"}\n')
    (tmp_path / "pipeline.yaml").write_text(pipeline())
    exported_models.weather(tmp_path / "DIR")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def dev(httpserver: HTTPServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunningSandbox]:
    """Stack dev: a job `JOB` that runs and a bucket, both in a sandbox, and an endpoint that counts and predicts."""

    def answer(request: Request) -> Response:
        count = {"count": 4, "people": [], "image": {"width": 1, "height": 1}, "model": {"name": "n", "version": "1"}}
        instances = json.loads(request.data)["instances"] if request.is_json else []
        predictions = [count if "image" in one else exported_models.predicted(1.0, 2.0, 10.0) for one in instances]
        return Response(json.dumps({"predictions": predictions} if instances else count), mimetype="application/json")

    httpserver.expect_request(re.compile(r"/v1/e/1:\w+")).respond_with_handler(answer)
    with RunningSandbox() as sandbox:
        credentials = AnonymousCredentials()  # type: ignore[no-untyped-call]
        client = storage.Client("a-project", credentials, client_options={"api_endpoint": sandbox.url})
        client.create_bucket("a-project-hc-models-dev", location="europe-west4")
        stored = client.bucket("a-project-hc-models-dev").blob("templates/census.yaml")
        stored.upload_from_string(pipeline())
        photos = client.create_bucket("my-photos", location="europe-west4")
        photos.blob("1.jpg").upload_from_string(b"x", content_type="image/jpeg")
        client.close()
        serve(sandbox)
        create(sandbox, job(pool(stubbed(STUB_LOG="accuracy 0.85", STUB_SECONDS="1000")), name="JOB"))
        here = {
            "url": f"{sandbox.url}/v1/{sandbox.location}/endpoints/1", "endpoint": f"{sandbox.location}/endpoints/1",
            "modelBucket": "gs://a-project-hc-models-dev", "images": {"main": "host/people@sha256:" + "a" * 64},
            "pipelineTemplate": "gs://a-project-hc-models-dev/templates/census.yaml",
            "pipelineParameters": {"text": "a"},
        }  # fmt: skip
        for module in (batch_command, jobs, register_command):
            monkeypatch.setattr(module, "outputs", lambda _: here)
        for name in ("headcount.release_command.outputs", "headcount.stacks.outputs"):
            monkeypatch.setattr(name, lambda _: here)
        monkeypatch.setattr("headcount.pipelines.POLL_SECONDS", 0.05)
        served = {"url": httpserver.url_for("/v1/e/1"), "maxRequestBytes": 10**6}
        monkeypatch.setattr(endpoint, "outputs", lambda _: served)
        monkeypatch.setattr(jobs, "POLL_SECONDS", 0.05)
        monkeypatch.setattr("headcount.batch_job.POLL_SECONDS", 0.05)
        yield sandbox


def serve(sandbox: RunningSandbox) -> None:
    """Deploys a stub of a release on the sandbox's endpoint 1."""
    container = {"imageUri": "image@sha256:" + "0" * 64, "predictRoute": "/predict", "healthRoute": "/ping"}
    model = {"displayName": "people", "containerSpec": container}
    uploaded = sandbox.do("POST", "models:upload", {"modelId": "people", "model": model})["response"]
    sandbox.do("POST", "endpoints", {"displayName": "people"}, endpointId=1)
    machines = {"minReplicaCount": 1, "machineSpec": {"machineType": "c3-highcpu-4"}}
    deployed = {"model": uploaded["model"], "dedicatedResources": machines}
    sandbox.do("POST", "endpoints/1:deployModel", {"deployedModel": deployed, "trafficSplit": {"0": 100}})


def test_lines_of_headcount_do_what_the_guide_s_did(checkout: Path, dev: RunningSandbox) -> None:
    said = {}
    lines = [line for line in dict.fromkeys(TYPED) if line.startswith("headcount ")]
    # A log is followed until its job has ended, and that of a cancelled job ends with 1.
    for line in sorted(lines, key=lambda line: "logs" in line):
        done = CliRunner().invoke(app, shlex.split(line)[1:], catch_exceptions=False)
        assert done.exit_code == (line == "headcount logs JOB --stack dev -f"), (line, done.output)
        if line.startswith("headcount batch"):
            assert "1 pictures, 4 people, in gs://a-project-hc-models-dev/batch/" in done.stderr
            continue
        said[line.removeprefix("headcount ").removesuffix(" --stack dev")] = done.stdout
    assert re.search(r"picture\.jpg\s+4\b", said.pop("count --stack dev picture.jpg"))
    for place in ("--model DIR", "--stack dev"):
        assert said.pop(f"predict {place} --json-instances instances.json").split() == [
            "CLASS_IDS", "CLASSES", "SCORE", "[1]", "['wet']", "[11.0]"
        ]  # fmt: skip
    assert "model: gs://a-project-hc-models-dev/weather/" in said.pop("register DIR")
    assert re.search(r"custom +(RUNNING|PENDING) .*JOB", said.pop("jobs"))
    assert "cancelling" in said.pop("jobs --stack dev cancel JOB")
    assert "accuracy 0.85" in said.pop("logs JOB --stack dev -f")
    assert said.pop("pipelines upload pipeline.yaml").startswith("gs://a-project-hc-models-dev/templates/optional-")
    assert "/pipelineJobs/optional-" in said.pop("pipelines run")
    assert "/pipelineJobs/run-" in said.pop("pipelines run pipeline.yaml --stack dev --experiment weekly --name RUN")
    assert said.pop("pipelines list").count("optional-") == 1
    assert re.search(r"^perhaps +\w+", said.pop("pipelines show RUN"), re.MULTILINE)
    assert "perhaps: " in said.pop("pipelines logs RUN --stack dev -f")
    assert all(line.startswith("release ") for line in said)
    assert len(said) >= 3


@pytest.mark.slow
def test_tensorboard_serves_the_folder_of_the_runs(tmp_path: Path) -> None:
    printed = subprocess.run(["make", "-n", "tensorboard"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    command, *options = shlex.split(printed.splitlines()[-1])[1:]
    assert options == ["--logdir", "runs", "--host", "127.0.0.1"]
    with subprocess.Popen(
        [ROOT / command, *options, "--port", "0"], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr
        assert any(re.search(r"TensorBoard .* at http://127\.0\.0\.1:\d+", line) for line in process.stderr)
        process.terminate()
