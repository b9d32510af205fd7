"""Tuning jobs by the provider as a process, on the sandbox: what differs from custom jobs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from helpers import eventually
from vertex_harness import in_background, options, plugin, sandbox
from vertex_jobs import JobWorld
from vertex_plugin import IMAGE, PARENT, PROJECT, CallFailed, Plugin, Plugins, Stack, Wire

from sandbox.testing import RunningSandbox

__all__ = ["options", "plugin", "sandbox"]  # fixtures

URN = "urn:pulumi:test::people::vertex:index:TuningJob::"
PARAMETERS: Wire = {
    "lr": {"type": "DOUBLE", "minValue": 0.001, "maxValue": 0.1, "scaleType": "UNIT_LOG_SCALE"},
    "batch": {"type": "INTEGER", "minValue": 32, "maxValue": 512, "scaleType": "UNIT_LINEAR_SCALE"},
    "model": {"type": "CATEGORICAL", "categories": ["dnn", "cnn"]},
    "dprob": {"type": "DISCRETE", "values": [0.1, 0.3, 0.6]},
}


class World(JobWorld):
    def stack(self) -> Stack:
        return Stack(URN + self.name)

    def study(self, env: Wire | None = None, **more: Any) -> Wire:
        return {
            "image": IMAGE,
            "machineType": "n1-standard-2",
            "env": {"STUB_METRIC": "score", **(env or {})},
            "baseOutputDirectory": "gs://a-bucket/out",
            "metrics": [{"id": "score", "goal": "MAXIMIZE"}],
            "parameters": PARAMETERS,
            "maxTrials": 4,
            "parallelTrials": 2,
            "algorithm": "RANDOM_SEARCH",
            **more,
        }


@pytest.fixture
def world(sandbox: RunningSandbox, plugin: Plugin) -> Iterator[World]:
    """At its end every ordered fault must have been met."""
    world = World(sandbox.project(PROJECT), plugin, "hyperparameterTuningJobs")
    yield world
    unused = sandbox.unused_faults()
    sandbox.clear_faults()
    sandbox.release()
    assert unused == []


def test_a_study_tells_its_best_trial_and_where_its_model_is(world: World) -> None:
    stack, wanted = world.stack(), world.study({"STUB_LOG": "epoch 3"})
    world.up_held(stack, wanted, ", 3 of 4 trials, best score ", ": trial ", ": epoch 3")
    (job,) = world.there
    outputs = stack.outputs
    assert stack.id == f"{PARENT}/hyperparameterTuningJobs/{job['name'].rpartition('/')[2]}"
    assert outputs["state"] == "SUCCEEDED"
    assert [trial["state"] for trial in outputs["trials"]] == ["SUCCEEDED"] * 4
    scores = {trial["id"]: trial["metrics"]["score"] for trial in outputs["trials"]}
    best = max(scores, key=lambda id_: scores[id_])
    assert outputs["bestTrial"] == best
    assert outputs["bestMetrics"] == {"score": scores[best]}
    # The stub's metric is the sum of the numeric arguments that it got.
    chosen = outputs["bestParameters"]
    assert set(chosen) == set(PARAMETERS)
    assert sum(float(chosen[name]) for name in ("lr", "batch", "dprob")) == pytest.approx(scores[best])
    assert chosen["batch"].isdecimal()
    assert outputs["artifactUri"] == f"{outputs['outputDirectory']}/{best}/model"
    (trial,) = [t for t in job["trials"] if t["id"] == best]
    child = world.sandbox.do("GET", f"customJobs/{trial['customJob'].rpartition('/')[2]}")
    assert child["jobSpec"]["baseOutputDirectory"]["outputUriPrefix"] + "/model" == outputs["artifactUri"]
    assert stack.up(world.plugin, wanted) == "same"
    assert stack.refresh(world.plugin) is False
    assert stack.up(world.plugin, world.study({"STUB_LOG": "epoch 3"}, maxTrials=2)) == "replace"
    assert len(world.there) == 1
    assert len(stack.outputs["trials"]) == 2
    stack.delete(world.plugin)
    assert world.there == []


def test_a_failed_trial_is_no_failed_study_but_too_many_are(world: World) -> None:
    stack = world.stack()
    stack.up(world.plugin, world.study({"STUB_FAILS": "1"}))
    assert sorted(trial["state"] for trial in stack.outputs["trials"]) == ["INFEASIBLE"] + ["SUCCEEDED"] * 3
    assert stack.outputs["bestTrial"] != "1"
    wanted = world.study({"STUB_FAILS": "1,2", "STUB_ERRORS": "diverged"}, maxFailedTrials=2)
    with pytest.raises(CallFailed, match="\n2 trials have failed") as failed:
        stack.up(world.plugin, wanted)
    assert "diverged" in str(failed.value)
    assert stack.outputs["state"] == "FAILED"
    assert stack.up(world.plugin, wanted, preview=True) == "replace"
    stack.delete(world.plugin)
    assert world.there == []


def test_after_ctrl_c_a_study_goes_on_and_destroy_cancels_its_trials(world: World) -> None:
    stack, wanted = world.stack(), world.study({"STUB_SECONDS": "600"})
    with Plugins(world.sandbox.url) as plugins:
        error = world.stop(plugins, stack, wanted)
    assert "The job goes on" in str(error)
    assert eventually(lambda: len(world.there[0].get("trials", [])) == 2)
    assert stack.up(world.plugin, wanted, preview=True) == "update"
    stack.delete(world.plugin)
    assert world.there == []


def test_a_study_whose_state_was_lost_is_waited_for(world: World) -> None:
    wanted, stack = world.study(), world.stack()
    world.hold()
    world.stack().up(world.plugin, wanted | {"wait": False})
    with in_background(lambda: stack.up(world.plugin, wanted)) as failed:
        assert eventually(lambda: any(line.urn == stack.urn for line in world.plugin.engine.lines))
        world.sandbox.release()
    assert failed == []
    assert world.states == ["SUCCEEDED"]
    stack.delete(world.plugin)


def test_a_study_is_imported_by_its_name(world: World) -> None:
    stack, wanted = world.stack(), world.study(displayName=world.name, maxFailedTrials=3, maxTrials=2)
    stack.up(world.plugin, wanted)
    imported = Stack(stack.urn, id=stack.id)
    imported.refresh(world.plugin)
    assert imported.inputs == wanted | {"replicas": 1, "bootDiskGb": 100}
    assert imported.up(world.plugin, wanted) == "same"
    with pytest.raises(CallFailed, match="hyperparameterTuningJobs/ID"):
        Stack(stack.urn, id=stack.id.replace("hyperparameterTuningJobs", "customJobs")).refresh(world.plugin)
    imported.delete(world.plugin)
    assert world.there == []
