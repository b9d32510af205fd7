"""From data to a served endpoint in one `pulumi up`: a stack with a census job, its version and its rollout.

The real engine with the google and docker-build providers, against the sandbox. Tiny images stand in for both images.
The tests are in the order of a stack's life.
"""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from engine_project import EngineProject
from helpers import eventually

pytestmark = [pytest.mark.slow, pytest.mark.needs("engine", "docker", "registry", "build"), pytest.mark.timeout(600)]

LOCATION = "projects/headcount-local/locations/europe-west4"


class Training(EngineProject):
    """A project whose stack has a census job and one release, which serves its model."""

    def start(self) -> None:
        super().start()
        self.data("one\ntwo\n")

    def data(self, records: str) -> None:
        for name in ("adult.data", "adult.test"):
            file = self.folder / "table" / name
            file.parent.mkdir(exist_ok=True)
            file.write_text(records)

    def train(self, *args: str) -> None:
        settings = {
            "headcount:training": {"census": {"workload": "census", "data": "table", "args": args}},
            "headcount:releases": {"main": {"image": "build", "model": "training/census", "traffic": 100}},
        }
        lines = "".join(f"  {key}: {json.dumps(value)}\n" for key, value in settings.items())
        (self.folder / "Pulumi.local.yaml").write_text(self.stack_file.replace("config:\n", f"config:\n{lines}"))

    def ask(self, path: str, method: str = "GET", **body: Any) -> Any:
        return httpx.request(method, f"{self.sandbox.url}/{path}", json=body or None, timeout=60).json()

    @property
    def jobs(self) -> dict[str, str]:
        """The state of each job by its id."""
        found = self.ask(f"v1/{LOCATION}/customJobs").get("customJobs", [])
        return {job["name"].rpartition("/")[2]: job["state"].removeprefix("JOB_STATE_") for job in found}

    def served(self) -> dict[str, Any]:
        """The environment of the container that answers, and the model that it would read."""
        answer = self.ask(
            self.outputs()["url"].removeprefix(f"{self.sandbox.url}/") + ":predict", "POST", instances=[{}]
        )
        environment: dict[str, Any] = answer["predictions"][0]["env"]
        bucket, _, folder = environment["AIP_STORAGE_URI"].removeprefix("gs://").partition("/")
        name = f"{folder}/contract.json".replace("/", "%2F")
        return {"uri": environment["AIP_STORAGE_URI"], **self.ask(f"storage/v1/b/{bucket}/o/{name}?alt=media")}

    def objects(self) -> list[str]:
        bucket = self.outputs()["modelBucket"].removeprefix("gs://")
        return [one["name"] for one in self.ask(f"storage/v1/b/{bucket}/o").get("items", [])]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Training]:
    project = Training(tmp_path_factory.mktemp("engine"))
    project.start()
    yield project
    project.close()


def test_a_stack_without_the_setting_has_nothing_of_it(project: Training) -> None:
    project.up()
    assert project.jobs == {}
    assert project.ask(f"v1/{LOCATION}/tensorboards") == {}
    assert project.objects() == []
    assert "trained" not in project.outputs()


def test_one_up_leads_from_the_data_to_a_served_model(project: Training) -> None:
    project.train("--train-steps=1")
    project.up()
    assert list(project.jobs.values()) == ["SUCCEEDED"]
    served = project.served()
    assert served["uri"] == project.outputs()["trained"]["census"]
    assert served["lines"] == {"train-files": 2, "eval-files": 2}
    assert served["options"][-1] == "--train-steps=1"
    kinds = {name.split("/")[0] for name in project.objects()}
    assert kinds == {"data", "training"}


def test_a_second_up_has_nothing_to_do(project: Training) -> None:
    before = project.jobs
    project.pulumi("preview", "-s", "local", "--expect-no-changes")
    project.pulumi("refresh", "-s", "local", "--yes", "--expect-no-changes")
    assert project.jobs == before


@pytest.mark.parametrize("changed", ["arguments", "data"])
def test_a_change_trains_anew_and_rolls_out_the_new_model(project: Training, changed: str) -> None:
    before, old = project.served(), project.jobs
    if changed == "arguments":
        project.train("--train-steps=2")
    else:
        project.data("one\ntwo\nthree\n")
    project.up()
    after = project.served()
    assert after["uri"] != before["uri"]
    assert after["options"][-1] == "--train-steps=2"
    assert after["lines"]["train-files"] == (2 if changed == "arguments" else 3)
    assert list(project.jobs.values()) == ["SUCCEEDED"]
    assert project.jobs != old, "the old record is gone"
    assert len([one for one in project.objects() if one.endswith("adult.data")]) == 1, "the old data is gone"
    assert len(project.ask(f"v1/{LOCATION}/models/headcount-local:listVersions")["models"]) == 1


def test_a_failed_job_leaves_what_serves_and_is_repaired_by_the_next_up(project: Training) -> None:
    before = project.served()
    project.train("--train-steps=3", "--break")
    said = project.pulumi("up", "-s", "local", "--yes", "--skip-preview", fails=True)
    assert "The job has failed, and the next `pulumi up` runs it again" in said
    assert "the data is broken" in said
    assert project.served() == before
    assert sorted(project.jobs.values()) == ["FAILED", "SUCCEEDED"]
    project.train("--train-steps=3")
    project.up()
    assert project.served()["options"][-1] == "--train-steps=3"
    assert list(project.jobs.values()) == ["SUCCEEDED"]


def test_after_ctrl_c_the_job_goes_on_and_the_next_up_waits_for_it(project: Training) -> None:
    before = project.served()
    project.train("--train-steps=4")
    project.sandbox.fault("customJobs.create", "hold")
    with subprocess.Popen(
        ["pulumi", "up", "-s", "local", "--yes", "--skip-preview", "--non-interactive"],
        cwd=project.folder, env=project.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ) as process:  # fmt: skip
        held = eventually(lambda: "RUNNING" in project.jobs.values(), seconds=300)
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=300)
    assert held, said
    assert process.returncode
    assert "The job goes on: the next `pulumi up` waits for it" in said
    running = project.jobs
    assert sorted(running.values()) == ["RUNNING", "SUCCEEDED"]
    project.sandbox.clear_faults()
    project.sandbox.release()
    project.up()
    (kept,) = project.jobs
    assert kept in running, "the job was not started a second time"
    assert project.served()["uri"] != before["uri"]


def test_destroy_leaves_nothing(project: Training) -> None:
    project.pulumi("destroy", "-s", "local", "--yes", "--skip-preview")
    kinds = ("models", "endpoints", "customJobs", "tensorboards")
    assert {kind: project.ask(f"v1/{LOCATION}/{kind}") for kind in kinds} == {kind: {} for kind in kinds}
    assert project.ask("iam/v1/projects/headcount-local/serviceAccounts") == {}
    assert project.ask("storage/v1/b?project=headcount-local").get("items", []) == []
    policy = project.ask("cloudresourcemanager/v1/projects/headcount-local:getIamPolicy", "POST")
    assert "training" not in json.dumps(policy)
    assert project.containers() == []
    assert project.sandbox.violations() == []
