"""A pipeline that kfp compiles, and its job as Vertex AI answers it, with tasks in all states.

Without `from __future__ import annotations`, because kfp reads the annotations themselves.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def"
# kfp has no types, and a return type would be an output.

import copy
import functools
from pathlib import Path
from typing import Any, Optional

import yaml

from sandbox.discovery import Method, response_violations, route

PARENT = "projects/p/locations/europe-west4"
JOBS = f"{PARENT}/pipelineJobs"


@functools.cache
def compiled() -> str:
    """The YAML of a pipeline with a loop, a condition, an exit handler, and parameters of all types."""
    import tempfile

    from kfp import compiler, dsl

    @dsl.container_component
    def download(source: str, data: dsl.Output[dsl.Dataset]):
        return dsl.ContainerSpec(image="host/image", command=["download"], args=[source, data.path])

    @dsl.container_component
    def train(data: dsl.Input[dsl.Dataset], rate: float, model: dsl.Output[dsl.Model]):
        return dsl.ContainerSpec(image="host/image", command=["train"], args=[data.path, rate, model.path])

    @dsl.container_component
    def evaluate(data: dsl.Input[dsl.Dataset], steps: int, better: dsl.OutputPath(str)):  # type: ignore[valid-type]
        return dsl.ContainerSpec(image="host/image", command=["evaluate"], args=[data.path, steps, better])

    @dsl.container_component
    def register(name: str):
        return dsl.ContainerSpec(image="host/image", command=["register"], args=[name])

    @dsl.container_component
    def clean_up():
        return dsl.ContainerSpec(image="host/image", command=["rm"])

    @dsl.pipeline(name="digits-weekly", pipeline_root="gs://elsewhere/root")
    def pipeline(
        source: str,
        steps: int = 100,
        share: float = 0.5,
        augment: bool = False,
        rates: list = [0.1, 0.2],  # type: ignore[type-arg]  # noqa: B006
        labels: dict = {},  # type: ignore[type-arg]  # noqa: B006
        note: Optional[str] = None,  # noqa: UP045  # kfp reads no other
    ):
        with dsl.ExitHandler(clean_up()):
            data = download(source=source).outputs["data"]
            with dsl.ParallelFor(rates) as rate:
                train(data=data, rate=rate)
            judged = evaluate(data=data, steps=steps)
            with dsl.If(judged.outputs["better"] == "yes", name="better"):
                register(name=source)

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "pipeline.yaml"
        compiler.Compiler().compile(pipeline, str(file))
        return file.read_text()


def spec() -> dict[str, Any]:
    return copy.deepcopy(_spec())


@functools.cache
def _spec() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(compiled())
    return found


def method(http: str, path: str) -> Method:
    found = route(http, path)
    assert found is not None
    return found


def task(number: int, name: str, state: str, parent: int = 0, **more: Any) -> dict[str, Any]:
    """A task's detail. number: its id, and the minute in which it started; it took 30 s."""
    at = {"createTime": f"2026-01-01T03:{number:02}:00Z"}
    if state not in ("NOT_TRIGGERED", "PENDING"):
        at["startTime"] = f"2026-01-01T03:{number:02}:00.123456789Z"
    if state in ("SUCCEEDED", "FAILED", "SKIPPED"):
        at["endTime"] = f"2026-01-01T03:{number:02}:30.123456789Z"
    within = {"parentTaskId": str(parent)} if parent else {}
    return {"taskId": str(number), "taskName": name, "state": state, **at, **within, **more}


def ran_by(job: int, *failed: int) -> dict[str, Any]:
    detail: dict[str, Any] = {"mainJob": f"{PARENT}/customJobs/{job}"}
    if failed:
        detail["failedMainJobs"] = [f"{PARENT}/customJobs/{one}" for one in failed]
    return {"executorDetail": {"containerDetail": detail}}


def job(state: str = "RUNNING", *details: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A job of the pipeline, with the details of its tasks."""
    found = {
        "name": f"{JOBS}/digits-weekly-1",
        "displayName": "weekly",
        "state": f"PIPELINE_STATE_{state}",
        "createTime": "2026-01-01T03:00:00.5Z",
        "startTime": "2026-01-01T03:00:01Z",
        **({"endTime": "2026-01-01T03:12:01Z"} if state in ("SUCCEEDED", "FAILED", "CANCELLED") else {}),
        "pipelineSpec": spec(),
        "jobDetail": {"taskDetails": list(details)},
        **more,
    }
    assert response_violations(method("GET", f"v1/{JOBS}/a"), 200, found) == []
    return found


def failed() -> dict[str, Any]:
    """A job that failed in the second of its two iterations. Root and iterations have details of their own."""
    return job(
        "FAILED",
        task(1, "digits-weekly-1", "FAILED"),
        task(2, "exit-handler-1", "FAILED", 1),
        task(3, "download", "SKIPPED", 2),
        task(4, "for-loop-2", "FAILED", 2),
        task(5, "for-loop-2-0", "SUCCEEDED", 4),
        task(6, "train", "SUCCEEDED", 5, **ran_by(106, 105)),
        task(7, "for-loop-2-1", "FAILED", 4),
        task(8, "train", "FAILED", 7, error={"code": 9, "message": "exit code 3\nno <memory>"}, **ran_by(108)),
        task(9, "evaluate", "SUCCEEDED", 2, **ran_by(109)),
        task(10, "better", "NOT_TRIGGERED", 2),
        task(11, "clean-up", "SUCCEEDED", 1, **ran_by(111)),
        error={"code": 9, "message": "The DAG failed because some tasks failed."},
    )


def running() -> dict[str, Any]:
    """A job in its first task."""
    return job("RUNNING", task(2, "exit-handler-1", "RUNNING"), task(3, "download", "RUNNING", 2, **ran_by(103)))
