"""What a project is and may use: Resource Manager, Service Usage, and the regions of Compute Engine."""

import time
from typing import Any

from sandbox.cloud import Call, project_number
from sandbox.errors import GoogleError, not_found
from sandbox.iam import policy_methods
from sandbox.store import JSON

# Some that exist; the google provider only asks whether the one that is configured is among them.
REGIONS = (
    *("asia-east1", "asia-northeast1", "asia-south1", "asia-southeast1", "australia-southeast1", "me-west1"),
    *("europe-north1", "europe-west1", "europe-west2", "europe-west3", "europe-west4", "europe-west9"),
    *("northamerica-northeast1", "southamerica-east1", "us-central1", "us-east1", "us-east4", "us-west1"),
)
CREATED = "2026-01-01T00:00:00.000000Z"
# https://cloud.google.com/service-usage/docs/enabled-service#default, and what enables the others.
ALWAYS = ("cloudresourcemanager", "serviceusage", "compute")


# ---------------------------------------------------------------------------------- Resource Manager


async def get_project(call: Call) -> JSON:
    """Every project exists."""
    project = call.name.split("/")[1]
    if call.method.version == "v1":
        return {
            "projectNumber": project_number(project),
            "projectId": project,
            "lifecycleState": "ACTIVE",
            "name": project,
            "createTime": CREATED,
        }
    return {
        "name": f"projects/{project_number(project)}",
        "projectId": project,
        "state": "ACTIVE",
        "displayName": project,
        "createTime": CREATED,
        "updateTime": CREATED,
        "etag": "BwY",
    }


# ------------------------------------------------------------------------------------- Service Usage


def check_enabled(call: Call) -> None:
    """With --api-delay, raises PERMISSION_DENIED for an API that is not enabled, or only just."""
    delay, api = call.cloud.settings.api_delay, call.method.document.partition(".")[0]
    if delay is None or api in ALWAYS:
        return
    parts = call.name.split("/")
    project = parts[1] if parts[0] == "projects" else call.query.get("project", "")
    if not project:  # buckets and objects do not say whose they are
        return
    enabled = call.cloud.store.get("service", f"{project}/{api}.googleapis.com")
    if enabled and time.time() - enabled["time"] >= delay:
        return
    number, service = project_number(project), f"{api}.googleapis.com"
    message = (
        f"{api} API has not been used in project {number} before or it is disabled. Enable it and then retry. "
        "If you enabled this API recently, wait a few minutes for the action to propagate to our systems and retry."
    )
    detail = {
        "@type": "type.googleapis.com/google.rpc.ErrorInfo",
        "reason": "SERVICE_DISABLED",
        "domain": "googleapis.com",
        "metadata": {"service": service, "consumer": f"projects/{number}"},
    }
    raise GoogleError("PERMISSION_DENIED", message, details=[detail])


def _service(call: Call, project: str, service: str) -> JSON:
    on = call.cloud.store.get("service", f"{project}/{service}") is not None
    number = project_number(project)
    return {
        "name": f"projects/{number}/services/{service}",
        "parent": f"projects/{number}",
        "config": {"name": service, "title": service},
        "state": "ENABLED" if on or service.partition(".")[0] in ALWAYS else "DISABLED",
    }


def _enable(call: Call, project: str, names: list[str]) -> None:
    with call.cloud.store.transaction():
        for name in names:
            if not name.endswith(".googleapis.com"):
                raise GoogleError("PERMISSION_DENIED", f"Not found or permission denied for service(s): {name}.")
            if not call.cloud.store.get("service", f"{project}/{name}"):
                call.cloud.store.put("service", f"{project}/{name}", {"time": time.time()})


def _operation(response: JSON, kind: str) -> JSON:
    # Google names an operation that was done at once so, too.
    response["@type"] = f"type.googleapis.com/google.api.serviceusage.v1.{kind}"
    return {"name": "operations/noop.DONE_OPERATION", "done": True, "response": response}


async def get_service(call: Call) -> JSON:
    _, project, _, service = call.name.split("/")
    return _service(call, project, service)


async def list_services(call: Call) -> JSON:
    project = call.name.split("/")[1]
    names = {n.partition("/")[2] for n, _ in call.cloud.store.list("service", f"{project}/")}
    wanted = call.query.get("filter", "").replace(" ", "").lower()
    if wanted == "state:disabled":
        return {}
    names |= {f"{api}.googleapis.com" for api in ALWAYS}
    return {"services": [_service(call, project, n) for n in sorted(names)]}


async def enable(call: Call) -> JSON:
    _, project, _, service = call.name.split("/")
    _enable(call, project, [service])
    return _operation({"service": _service(call, project, service)}, "EnableServiceResponse")


async def batch_enable(call: Call) -> JSON:
    project, names = call.name.split("/")[1], call.body.get("serviceIds", [])
    _enable(call, project, names)
    services = [_service(call, project, n) for n in names]
    return _operation({"services": services}, "BatchEnableServicesResponse")


async def disable(call: Call) -> JSON:
    _, project, _, service = call.name.split("/")
    with call.cloud.store.transaction():
        call.cloud.store.delete("service", f"{project}/{service}")
    return _operation({"service": _service(call, project, service)}, "DisableServiceResponse")


async def get_operation(call: Call) -> JSON:
    if call.name != "operations/noop.DONE_OPERATION":
        raise not_found(f"Operation {call.name} is not found.")
    return {"name": call.name, "done": True}


# --------------------------------------------------------------------------------------------- Compute


async def list_regions(call: Call) -> JSON:
    items = [{"kind": "compute#region", "name": name, "status": "UP"} for name in REGIONS]
    return {"kind": "compute#regionList", "id": call.name, "items": items}


METHODS: dict[str, Any] = {
    "cloudresourcemanager.projects.get": get_project,
    **policy_methods("cloudresourcemanager.projects"),
    "serviceusage.services.get": get_service,
    "serviceusage.services.list": list_services,
    "serviceusage.services.enable": enable,
    "serviceusage.services.batchEnable": batch_enable,
    "serviceusage.services.disable": disable,
    "serviceusage.operations.get": get_operation,
    "compute.regions.list": list_regions,
}
