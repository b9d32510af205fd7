"""A job, the version that serves its model, and its rollout in one stack, under Pulumi's own engine."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import eventually
from vertex_harness import Cloud
from vertex_plugin import IMAGE, PROJECT
from vertex_project import ENDPOINT, Project

from sandbox.testing import RunningSandbox

pytestmark = [pytest.mark.slow, pytest.mark.needs("engine"), pytest.mark.timeout(900)]
PROGRAM = """
import json
import pulumi
import pulumi_vertex as vertex

wanted = json.load(open("wanted.json"))
here = pulumi.ResourceOptions(provider=vertex.Provider("cloud", endpoint=wanted["url"]))
job = vertex.CustomJob(
    "census",
    here,
    machine_type="n1-standard-4",
    base_output_directory="gs://a-bucket/census",
    env={"KEY": pulumi.Output.secret("hunter2"), **wanted["env"]},
    **wanted["job"],
)
version = vertex.ModelVersion(
    "v", here, model_id="digits", image=wanted["job"]["image"], artifact_uri=job.artifact_uri
)
release = vertex.Deployed(model=version.id, traffic=100, machine_type="n1-standard-2")
vertex.Rollout("digits", here, endpoint=wanted["endpoint"], models={"main": release}, drain_seconds=0)
pulumi.export("artifact", job.artifact_uri)
pulumi.export("state", job.state)
"""


class Training(Project):
    """A project with a job, a version and a rollout."""

    def __init__(self, folder: Path, sandbox: RunningSandbox) -> None:
        super().__init__(folder, sandbox.url)
        self.sandbox = sandbox.project(PROJECT)
        (folder / "__main__.py").write_text(PROGRAM)

    def train(self, *args: str, env: dict[str, str] | None = None, **more: Any) -> None:
        job = {"image": IMAGE, "args": list(args), **more}
        wanted = {"url": self.url, "endpoint": ENDPOINT, "job": job, "env": env or {}}
        (self.folder / "wanted.json").write_text(json.dumps(wanted))

    @property
    def jobs(self) -> list[str]:
        """The states of the jobs that there are."""
        found = self.sandbox.do("GET", "customJobs").get("customJobs", [])
        return [job["state"].removeprefix("JOB_STATE_") for job in found]


@pytest.fixture(scope="module")
def sandbox() -> Iterator[RunningSandbox]:
    with RunningSandbox() as running:
        yield running
        assert running.violations() == []


@pytest.fixture(scope="module")
def cloud(sandbox: RunningSandbox) -> Cloud:
    cloud = Cloud.of(sandbox)
    cloud.endpoint("digits")
    return cloud


@pytest.fixture
def project(sandbox: RunningSandbox, cloud: Cloud, tmp_path: Path) -> Iterator[Training]:
    project = Training(tmp_path, sandbox)
    yield project
    sandbox.clear_faults()
    sandbox.release()
    project.destroy()
    assert project.jobs == []
    assert cloud.deployed(ENDPOINT) == {}
    assert cloud.versions("digits") == []


def test_from_a_job_to_its_endpoint_in_one_up_and_anew_with_other_arguments(project: Training, cloud: Cloud) -> None:
    project.train("--steps=1", env={"STUB_LOG": "accuracy 0.85"})
    assert project.counts(project.up()) == {"created": 5}
    first = project.outputs()
    assert first["state"] == "SUCCEEDED"
    (version,) = cloud.versions("digits")
    assert version.artifact_uri == first["artifact"]
    assert cloud.traffic(ENDPOINT) == {"digits@1": 100}
    state = "".join(path.read_text() for path in (project.folder / "state").rglob("*.json"))
    assert "vertex:index:CustomJob" in state
    assert "hunter2" not in state
    assert project.counts(project.up()) == {"unchanged": 5}
    assert project.counts(project.up("--refresh")) == {"unchanged": 5}

    project.train("--steps=2", env={"STUB_LOG": "accuracy 0.85"})
    before = cloud.writes()
    preview = project.pulumi("preview", "--diff")
    assert cloud.writes() == before
    assert '"--steps=1" => "--steps=2"' in preview
    assert f"{first['artifact']!r} => ".replace("'", '"') in preview, "the preview knows where the new model will be"
    assert project.counts(project.up()) == {"updated": 1, "replaced": 2, "changes": 3, "unchanged": 2}
    assert project.jobs == ["SUCCEEDED"]
    (version,) = cloud.versions("digits")
    assert (version.version_id, version.artifact_uri) == ("2", project.outputs()["artifact"])
    assert cloud.traffic(ENDPOINT) == {"digits@2": 100}


def test_a_failed_job_stops_the_run_and_is_repaired_by_the_next_one(project: Training, cloud: Cloud) -> None:
    project.train(env={"STUB_LOG": "reading adult.data"})
    project.sandbox.fault("customJobs.create", "operation_error", message="out of memory", when="after")
    said = project.up(fails=True)
    problem = said.split("vertex:index:CustomJob (census):")[1].split("pulumi:pulumi:Stack")[0]
    assert "The job has failed, and the next `pulumi up` runs it again: https://console" in problem
    assert "out of memory" in problem
    assert "reading adult.data" in problem
    assert "Traceback" not in problem
    assert cloud.versions("digits") == []
    assert project.jobs == ["FAILED"]
    assert project.counts(project.up("--refresh"))["replaced"] == 1
    assert project.jobs == ["SUCCEEDED"]
    assert project.counts(project.up()) == {"unchanged": 5}


@pytest.mark.parametrize("following", [("up",), ("destroy",)], ids=" ".join)
def test_after_ctrl_c_the_job_goes_on_and_the_next_run_has_it(project: Training, following: tuple[str, ...]) -> None:
    project.train()
    project.sandbox.fault("customJobs.create", "hold")
    process = project.start("up", "--yes", "--skip-preview")
    assert eventually(lambda: project.jobs == ["RUNNING"])
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=120)
    assert process.returncode
    assert "The job goes on: the next `pulumi up` waits for it" in said
    assert project.jobs == ["RUNNING"]
    process = project.start(*following, "--yes", "--skip-preview")
    if following[0] == "up":
        assert project.sandbox.ask("GET", "customJobs")[0] == 200
        project.sandbox.release()
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    if following[0] == "up":
        assert project.jobs == ["SUCCEEDED"]
        assert project.counts(project.up()) == {"unchanged": 5}
    else:
        assert project.jobs == []


def test_a_change_that_failed_is_taken_back(project: Training, cloud: Cloud) -> None:
    """Two states have the job that succeeded then, and it is not deleted with the older one."""
    project.train("--steps=1")
    project.up()
    project.train("--steps=2")
    project.sandbox.fault("customJobs.create", "operation_error", message="out of memory")
    project.up(fails=True)
    assert sorted(project.jobs) == ["FAILED", "SUCCEEDED"]
    assert cloud.traffic(ENDPOINT) == {"digits@1": 100}
    project.train("--steps=1")
    project.up()
    assert project.jobs == ["SUCCEEDED"]
    assert cloud.traffic(ENDPOINT) == {"digits@1": 100}
    assert project.counts(project.up("--refresh")) == {"unchanged": 5}
