"""The steps that tests of jobs share."""

from __future__ import annotations

from typing import Any

from helpers import eventually

from sandbox.testing import RunningSandbox

IMAGE = "europe-west4-docker.pkg.dev/a-project/images/training@sha256:" + "0" * 64


def container(image: str = IMAGE, env: dict[str, str] | None = None, **more: Any) -> dict[str, Any]:
    return {"imageUri": image, "env": [{"name": k, "value": v} for k, v in (env or {}).items()], **more}


def stubbed(**env: str) -> dict[str, Any]:
    """A container whose stub behaves as `sandbox.stub_runner` says."""
    return container(env=env)


def pool(spec: dict[str, Any], *, count: int = 1, machine: str = "n1-standard-4") -> dict[str, Any]:
    return {"containerSpec": spec, "machineSpec": {"machineType": machine}, "replicaCount": str(count)}


def job(*pools: dict[str, Any], name: str = "train", labels: dict[str, str] | None = None, **spec: Any) -> Any:
    """The body of a request that makes a custom job."""
    return {"displayName": name, "labels": labels or {}, "jobSpec": {"workerPoolSpecs": list(pools), **spec}}


def create(sandbox: RunningSandbox, body: Any, collection: str = "customJobs") -> str:
    """Makes a job and returns its path."""
    made = sandbox.do("POST", collection, body)
    return f"{collection}/{made['name'].rpartition('/')[2]}"


def state(sandbox: RunningSandbox, path: str) -> str:
    text: str = sandbox.do("GET", path)["state"]
    return text.removeprefix("JOB_STATE_")


def finished(sandbox: RunningSandbox, path: str) -> Any:
    """The job when it has ended."""
    assert eventually(lambda: state(sandbox, path) in ("SUCCEEDED", "FAILED", "CANCELLED")), state(sandbox, path)
    return sandbox.do("GET", path)


def run(sandbox: RunningSandbox, body: Any) -> Any:
    """The job of a body when it has ended."""
    return finished(sandbox, create(sandbox, body))


def entries(sandbox: RunningSandbox, text: str = "", **query: Any) -> list[Any]:
    """Log entries that match a filter."""
    project = "/".join(sandbox.location.split("/")[:2])
    body = {"resourceNames": [project], "filter": text, "pageSize": 1000, **query}
    status, answer = sandbox.ask_api("logging", "POST", "v2/entries:list", body)
    assert status == 200, answer
    return list(answer.get("entries", []))


def messages(sandbox: RunningSandbox, path: str, text: str = "") -> list[str]:
    """The texts of a job's log."""
    found = entries(sandbox, f'resource.labels.job_id="{path.rpartition("/")[2]}" {text}')
    return [e["textPayload"] if "textPayload" in e else e["jsonPayload"].get("message", "") for e in found]
