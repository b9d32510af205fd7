"""A stack with a pipeline that runs once and by a schedule: up, changed, again, destroyed.

The real engine with the google and docker-build providers, against the sandbox. Tiny images stand in for both images,
and stub containers for their steps. The tests are in the order of a stack's life.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from engine_project import EngineProject

pytestmark = [pytest.mark.slow, pytest.mark.needs("engine", "docker", "registry", "build"), pytest.mark.timeout(600)]

LOCATION = "projects/headcount-local/locations/europe-west4"
NIGHTLY = {"run": True, "cron": "0 3 * * *", "timeZone": "Europe/Amsterdam", "data": "table"}


class Pipelines(EngineProject):
    """A project whose stack has the pipeline."""

    def start(self) -> None:
        super().start()
        for name in ("adult.data", "adult.test"):
            file = self.folder / "table" / name
            file.parent.mkdir(exist_ok=True)
            file.write_text("a record\n")

    def declare(self, **pipeline: Any) -> None:
        line = f"  headcount:pipeline: {json.dumps(pipeline)}\n" if pipeline else ""
        (self.folder / "Pulumi.local.yaml").write_text(self.stack_file.replace("config:\n", f"config:\n{line}"))

    def ask(self, path: str, method: str = "GET") -> Any:
        return httpx.request(method, f"{self.sandbox.url}/{path}", timeout=60).json()

    @property
    def schedules(self) -> list[dict[str, Any]]:
        return list(self.ask(f"v1/{LOCATION}/schedules").get("schedules", []))

    @property
    def runs(self) -> dict[str, str]:
        """The state of each run by its id."""
        found = self.ask(f"v1/{LOCATION}/pipelineJobs").get("pipelineJobs", [])
        return {job["name"].rpartition("/")[2]: job["state"].removeprefix("PIPELINE_STATE_") for job in found}

    def counts(self, said: str) -> dict[str, int]:
        """How many resources an update has created, updated, replaced and so on, as its last lines say."""
        return {word: int(number) for number, word in re.findall(r"^    [+~-]+ (\d+) (\w+)", said, re.M)}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipelines]:
    project = Pipelines(tmp_path_factory.mktemp("engine"), runner="stub")
    project.start()
    yield project
    project.close()


def test_a_stack_without_the_setting_has_nothing_of_it(project: Pipelines) -> None:
    project.up()
    assert (project.schedules, project.runs) == ([], {})
    assert "pipelineTemplate" not in project.outputs()


def test_one_up_compiles_the_pipeline_runs_it_and_schedules_it(project: Pipelines) -> None:
    project.declare(**NIGHTLY, parameters={"train_steps": 1})
    project.up()
    assert list(project.runs.values()) == ["SUCCEEDED"]
    (schedule,) = project.schedules
    assert (schedule["state"], schedule["cron"]) == ("ACTIVE", "TZ=Europe/Amsterdam 0 3 * * *")
    job = schedule["createPipelineJobRequest"]["pipelineJob"]
    assert job["pipelineSpec"]["pipelineInfo"]["name"] == "census"
    assert job["runtimeConfig"]["parameterValues"]["train_steps"] == 1
    assert job["serviceAccount"].startswith("hc-pipeline-local@")
    images = set(re.findall(r"127\.0\.0\.1:\d+/\S+@sha256:[0-9a-f]{64}", json.dumps(job["pipelineSpec"])))
    assert {image.partition("@")[0].rpartition("/")[2] for image in images} == {"headcount", "headcount-training"}
    bucket, _, name = project.outputs()["pipelineTemplate"].removeprefix("gs://").partition("/")
    path = name.replace("/", "%2F")
    assert "name: census" in httpx.get(f"{project.sandbox.url}/storage/v1/b/{bucket}/o/{path}?alt=media").text


def test_a_second_up_has_nothing_to_do(project: Pipelines) -> None:
    before = project.runs
    project.pulumi("preview", "-s", "local", "--expect-no-changes")
    project.pulumi("refresh", "-s", "local", "--yes", "--expect-no-changes")
    project.pulumi("up", "-s", "local", "--yes", "--skip-preview", "--expect-no-changes")
    assert project.runs == before


def test_another_time_changes_the_schedule_in_place_and_runs_nothing(project: Pipelines) -> None:
    (old,), runs = project.schedules, project.runs
    project.declare(**NIGHTLY | {"cron": "30 4 * * 1-5", "paused": True}, parameters={"train_steps": 1})
    assert project.counts(project.up()) == {"updated": 1}
    (new,) = project.schedules
    assert (new["name"], new["cron"], new["state"]) == (old["name"], "TZ=Europe/Amsterdam 30 4 * * 1-5", "PAUSED")
    assert project.runs == runs


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"cron": "0 3 31 2 *"}, "never fires: no month of '0 3 31 2 *' has such a day."),
        ({"endTime": "2001-01-01T00:00:00Z"}, "Set a later endTime, or leave it out."),
        ({"parameters": {"train_step": 1}}, "is no parameter of the pipeline. Did you mean train_steps?"),
    ],
)
def test_a_mistake_ends_the_preview_with_a_sentence(project: Pipelines, wrong: dict[str, Any], said: str) -> None:
    before = project.schedules, project.runs
    project.declare(**NIGHTLY | wrong)
    printed = project.pulumi("preview", "-s", "local", fails=True)
    assert said in printed
    assert "Traceback" not in printed
    assert (project.schedules, project.runs) == before


def test_another_parameter_runs_anew_and_changes_the_schedule(project: Pipelines) -> None:
    (old,), runs = project.schedules, project.runs
    project.declare(**NIGHTLY, parameters={"train_steps": 2})
    project.up()
    assert list(project.runs.values()) == ["SUCCEEDED"]
    assert project.runs.keys().isdisjoint(runs)
    (new,) = project.schedules
    assert new["name"] == old["name"]
    assert new["state"] == "ACTIVE"
    request = new["createPipelineJobRequest"]["pipelineJob"]
    assert request["runtimeConfig"]["parameterValues"]["train_steps"] == 2


def test_destroy_leaves_nothing(project: Pipelines) -> None:
    project.pulumi("destroy", "-s", "local", "--yes", "--skip-preview")
    kinds = ("models", "endpoints", "pipelineJobs", "schedules")
    assert {kind: project.ask(f"v1/{LOCATION}/{kind}") for kind in kinds} == {kind: {} for kind in kinds}
    assert project.ask("iam/v1/projects/headcount-local/serviceAccounts") == {}
    assert project.ask("storage/v1/b?project=headcount-local").get("items", []) == []
    policy = project.ask("cloudresourcemanager/v1/projects/headcount-local:getIamPolicy", "POST")
    assert "pipeline" not in json.dumps(policy)
    assert project.sandbox.violations() == []
