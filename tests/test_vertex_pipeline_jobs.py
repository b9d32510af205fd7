"""Pipeline jobs by the provider as a process, on the sandbox: where they differ from other jobs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from helpers import eventually
from kfp.registry.registry_client import ApiAuth, RegistryClient
from parameter_template import linear
from vertex_harness import in_background, options, plugin, sandbox
from vertex_jobs import JobWorld
from vertex_plugin import PARENT, PROJECT, CallFailed, Plugin, Plugins, Stack, Wire

from sandbox.testing import RunningSandbox

pytestmark = pytest.mark.xdist_group("provider's pipelines")  # one sandbox, whose runs import kfp
__all__ = ["options", "plugin", "sandbox"]  # fixtures

ROOT = "gs://a-bucket/pipelines"


class PipelineWorld(JobWorld):
    def stack(self) -> Stack:
        return Stack(f"urn:pulumi:test::people::vertex:index:PipelineJob::{self.name}")

    def inputs(self, *args: str, env: Wire | None = None, **more: Any) -> Wire:
        # Of a test's own, because Vertex AI takes the outputs of an earlier run with the same inputs.
        parameters = {"text": self.name}
        return {"template": linear(**env or {}), "parameters": parameters, "pipelineRoot": ROOT, **more}


@pytest.fixture
def world(sandbox: RunningSandbox, plugin: Plugin) -> Iterator[PipelineWorld]:
    mine = sandbox.project(PROJECT)
    mine.ask_api("storage", "POST", f"v1/b?project={PROJECT}", {"name": "a-bucket"})
    world = PipelineWorld(mine, plugin, "pipelineJobs")
    yield world
    unused = sandbox.unused_faults()
    sandbox.clear_faults()
    sandbox.release()
    assert unused == []


def test_a_pipeline_runs_once_and_anew_with_another_parameter(world: PipelineWorld) -> None:
    stack, wanted = world.stack(), world.inputs(labels={"team": "a"}, displayName=world.name)
    world.up_held(stack, wanted, "running, ", "0 of 2 tasks, count")
    (job,) = world.there
    job_id = job["name"].rpartition("/")[2]
    assert stack.id == stack.outputs["name"] == f"{PARENT}/pipelineJobs/{job_id}"
    assert job_id.startswith("linear-20")
    assert (stack.outputs["state"], stack.outputs["outputDirectory"]) == ("SUCCEEDED", ROOT)
    assert stack.outputs["tasks"] == [
        {"name": name, "state": "SUCCEEDED", "error": ""} for name in ("count", "count-2")
    ]
    assert stack.outputs["console"].endswith(f"/pipelines/runs/{job_id}?project={PROJECT}")
    assert any(stack.outputs["console"] in line for line in world.plugin.lines())
    assert stack.up(world.plugin, wanted) == "same"
    assert stack.refresh(world.plugin) is False
    imported = Stack(stack.urn, id=stack.id)
    imported.refresh(world.plugin)
    assert imported.inputs == stack.inputs
    assert imported.up(world.plugin, wanted) == "same"
    assert stack.up(world.plugin, wanted | {"parameters": {"text": "bye"}}) == "replace"
    assert (len(world.there), world.states) == (1, ["SUCCEEDED"])
    stack.delete(world.plugin)
    assert world.there == []


def test_a_failed_task_is_named_with_its_log_and_the_next_up_runs_the_pipeline_again(world: PipelineWorld) -> None:
    stack, wanted = world.stack(), world.inputs(env={"STUB_EXIT": "3", "STUB_ERRORS": "ValueError: no rows"})
    with pytest.raises(CallFailed) as failed:
        stack.up(world.plugin, wanted)
    said = str(failed.value)
    assert said.startswith(
        "The job has failed, and the next `pulumi up` runs it again: https://console.cloud.google.com/"
    )
    assert "count-2: " in said
    assert said.count("ValueError: no rows") == 1
    assert [task["state"] for task in stack.outputs["tasks"]] == ["SUCCEEDED", "FAILED"]
    assert stack.up(world.plugin, wanted, preview=True) == "replace"
    stack.delete(world.plugin)
    assert world.there == []


@pytest.fixture(scope="module")
def plugins(sandbox: RunningSandbox) -> Iterator[Plugins]:
    with Plugins(sandbox.url) as plugins:
        yield plugins


def test_after_ctrl_c_the_run_goes_on_and_the_next_up_waits_for_it(world: PipelineWorld, plugins: Plugins) -> None:
    stack, wanted = world.stack(), world.inputs()
    world.hold()
    assert "The job goes on: the next `pulumi up` waits for it" in str(world.stop(plugins, stack, wanted))
    with in_background(lambda: stack.up(world.plugin, wanted)) as failed:
        assert eventually(lambda: any(line.urn == stack.urn for line in world.plugin.engine.lines))
        world.sandbox.release()
    assert failed == []
    assert (world.states, stack.outputs["state"]) == (["SUCCEEDED"], "SUCCEEDED")
    stack.delete(world.plugin)


def test_a_run_is_cancelled_when_it_is_destroyed(world: PipelineWorld) -> None:
    stack = world.stack()
    world.hold()
    stack.up(world.plugin, world.inputs(wait=False))
    stack.delete(world.plugin)
    assert world.there == []
    assert world.writes()[-2:] == ["cancel", "delete"]


def test_a_lost_answer_starts_no_second_run(world: PipelineWorld) -> None:
    stack = world.stack()
    world.drop("create", "after")
    stack.up(world.plugin, world.inputs(wait=False))
    assert len(world.there) == 1
    stack.delete(world.plugin)


@pytest.mark.parametrize("where", ["bucket", "repository"])
def test_a_template_is_read_from_a_bucket_or_a_repository(world: PipelineWorld, where: str, tmp_path: Path) -> None:
    stack, wanted = world.stack(), world.inputs(wait=False)
    text = wanted.pop("template")
    file = tmp_path / "linear.yaml"
    file.write_text(text)
    client = RegistryClient(f"{world.sandbox.url}/kfp/europe-west4/{PROJECT}/templates", ApiAuth("sandbox"))

    def upload() -> None:
        if where == "repository":
            client.upload_pipeline(str(file))
        else:
            path = "upload/storage/v1/b/a-bucket/o?uploadType=media&name=templates/linear%20of%20mine.yaml"
            assert httpx.post(f"{world.sandbox.url}/{path}", content=text).status_code == 200

    if where == "repository":
        path = f"v1/{PARENT}/repositories?repositoryId=templates"
        world.sandbox.ask_api("artifactregistry", "POST", path, {"format": "KFP"})
        version = f"linear/sha256:{hashlib.sha256(text.encode()).hexdigest()}"
        wanted["templateUri"] = f"https://europe-west4-kfp.pkg.dev/{PROJECT}/templates/{version}"
    else:
        wanted["templateUri"] = "gs://a-bucket/templates/linear of mine.yaml"
    stack.up(world.plugin, wanted, preview=True)  # another resource may upload it in the same run
    with pytest.raises(CallFailed, match=f"There is no template at {wanted['templateUri']}"):
        stack.up(world.plugin, wanted)
    upload()
    with pytest.raises(CallFailed, match=r"parameters\.txt is no parameter of the pipeline\. Did you mean text\?"):
        stack.up(world.plugin, wanted | {"parameters": {"txt": "x"}}, preview=True)
    stack.up(world.plugin, wanted)
    (job,) = world.there
    assert job.get("templateUri", "gs://") == (wanted["templateUri"] if where == "repository" else "gs://")
    assert job["pipelineSpec"]["pipelineInfo"]["name"] == "linear"
    stack.delete(world.plugin)
