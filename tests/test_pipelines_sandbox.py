"""`headcount pipelines` on the sandbox (stub containers)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pipeline_templates as templates
import pytest
import yaml
from google.cloud.artifactregistry_v1 import Repository
from google_clients import artifact_registry
from kfp.registry.registry_client import ApiAuth, RegistryClient
from typer.testing import CliRunner, Result

from headcount import jobs, pipelines
from headcount.cli import app
from sandbox.testing import RunningSandbox

pytestmark = pytest.mark.xdist_group("pipelines")  # one process imports kfp, and one sandbox's processes do


@pytest.fixture
def sandbox(stub_sandbox: RunningSandbox, project: str, monkeypatch: pytest.MonkeyPatch) -> RunningSandbox:
    """A project of the sandbox with a bucket, in which stack local is."""
    there = stub_sandbox.project(project)
    bucket = f"models-{project}"
    status, _ = there.ask_api("storage", "POST", f"v1/b?project={project}", {"name": bucket})
    assert status == 200
    found = {
        "endpoint": f"{there.location}/endpoints/1",
        "url": f"{there.url}/v1/{there.location}/endpoints/1",
        "modelBucket": f"gs://{bucket}",
    }
    monkeypatch.setattr("headcount.stacks.outputs", lambda _: found)
    monkeypatch.setattr(pipelines, "POLL_SECONDS", 0.1)
    monkeypatch.setattr(jobs, "POLL_SECONDS", 0.1)
    return there


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["pipelines", *arguments, "--stack", "local"])


def written(folder: Path, spec: Any) -> str:
    file = folder / "pipeline.yaml"
    file.write_text(yaml.safe_dump(spec, sort_keys=True))
    return str(file)


def test_a_run_is_started_followed_drawn_listed_and_cached(sandbox: RunningSandbox, tmp_path: Path) -> None:
    template = written(tmp_path, templates.linear(set_env_variable=["STUB_LOG", "counted"]))
    done = run("run", template, "--param", "times=3", "--name", "first", "-f")
    assert done.exit_code == 0, done.output
    ends = [line.partition(" ")[2] for line in done.stdout.splitlines() if line.endswith("succeeded")]
    assert ends == ["make: succeeded", "use: succeeded"]
    said = run("logs", "first", "use")
    assert "use: counted" in [line.partition(" ")[2] for line in said.stdout.splitlines()]
    assert "make: " not in said.stdout
    assert "make: " in run("logs", "first").stdout
    run("run", template, "--param", "times=3", "--name", "second", "-f")
    rows = [line.split()[:2] for line in run("show", "second").stdout.splitlines()]
    assert ["make", "cached"] in rows
    assert ["use", "cached"] in rows
    listed = [line.split() for line in run("list").stdout.splitlines()[1:]]
    assert [(row[1], row[-1]) for row in listed] == [("SUCCEEDED", name) for name in ("second", "first")]


def test_loops_conditions_and_failures_are_drawn(sandbox: RunningSandbox, tmp_path: Path) -> None:
    done = run("run", written(tmp_path, templates.loops()), "--param", "wanted=false", "-f")
    assert done.exit_code == 0, done.output
    drawn = run("show", "loops").stdout
    rows = [" ".join(line.replace(" s ", " ").split()[:2]) for line in drawn.splitlines()[3:]]
    assert rows == [
        "condition-2 not", "for-loop-4 not", "say not",
        "enumerate-parts succeeded", "for-loop-1 succeeded",
        "[0] succeeded", "make succeeded", "[1] succeeded", "make succeeded", "[2] succeeded", "make succeeded",
        "gather succeeded",
    ]  # fmt: skip
    assert "3 of 3 iterations done" in drawn
    template = written(tmp_path, templates.linear(fail="7", set_retry=[1, "0s"]))
    failed = run("run", template, "--param", "times=1", "-f")
    assert failed.exit_code == 1
    assert "use: failed\n  ! The replica workerpool0-0 exited with a non-zero status of 7." in failed.stdout
    assert "2 attempts" in run("show", "linear").stdout


def test_a_template_of_a_repository_runs_by_its_address(sandbox: RunningSandbox, project: str, tmp_path: Path) -> None:
    """KFP's own client uploads it. The sandbox answers the address that it would have on Google."""
    with artifact_registry(sandbox) as client:
        made = client.create_repository(
            parent=f"projects/{project}/locations/europe-west4",
            repository_id="pipelines",
            repository=Repository(format_=Repository.Format.KFP),
        ).result(timeout=60)
        host = f"http://{client.get_repository(name=made.name).registry_uri}"
    template = written(tmp_path, templates.optional())
    RegistryClient(host=host, auth=ApiAuth("sandbox")).upload_pipeline(template, tags=["v1"])
    address = f"https://europe-west4-kfp.pkg.dev/{project}/pipelines/optional/v1"
    done = run("run", address, "--param", "text=here")
    assert done.exit_code == 0, done.output
    assert sandbox.do("GET", f"pipelineJobs/{done.stdout.split()[0].rpartition('/')[2]}")["templateUri"] == address
    missing = run("run", address.replace("v1", "v2"))
    assert missing.exit_code == 1
    assert f"/kfp/europe-west4/{project}/pipelines/optional/v2 answers 404" in missing.stderr
