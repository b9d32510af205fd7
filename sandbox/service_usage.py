"""Service Usage: which APIs a project has enabled, and the service agents of APIs.

https://cloud.google.com/service-usage/docs/reference/rest
"""

import uuid
from typing import Any

from sandbox import clock
from sandbox.context import Call
from sandbox.conventions import cut
from sandbox.discovery import DOCUMENTS, document
from sandbox.errors import WITHOUT_STATUS, GoogleError, invalid, not_found, unimplemented
from sandbox.iam import make_agent
from sandbox.projects import project_number
from sandbox.store import JSON

# https://cloud.google.com/service-usage/docs/enabled-service#default, and what enables the others.
ALWAYS = ("cloudresourcemanager", "serviceusage", "compute")
# The service agent that an API has in each project, {} standing for the project's number.
# https://cloud.google.com/iam/docs/service-agents
AGENTS = {
    "aiplatform": "service-{}@gcp-sa-aiplatform",
    "artifactregistry": "service-{}@gcp-sa-artifactregistry",
    "bigquery": "bq-{}@bigquery-encryption",
    "cloudbuild": "service-{}@gcp-sa-cloudbuild",
    "cloudscheduler": "service-{}@gcp-sa-cloudscheduler",
    "compute": "service-{}@compute-system",
    "container": "service-{}@container-engine-robot",
    "eventarc": "service-{}@gcp-sa-eventarc",
    "pubsub": "service-{}@gcp-sa-pubsub",
    "run": "service-{}@serverless-robot-prod",
    "secretmanager": "service-{}@gcp-sa-secretmanager",
}


def _is_enabled(call: Call, project: str, service: str, for_seconds: float = 0) -> bool:
    """Whether an API, such as `run.googleapis.com`, was enabled at least `for_seconds` ago."""
    if service.partition(".")[0] in ALWAYS:
        return True
    enabled = call.cloud.store.get("service", f"{project}/{service}")
    return enabled is not None and clock.time() - enabled["time"] >= for_seconds


def check_enabled(call: Call) -> None:
    """With --api-delay, raises PERMISSION_DENIED for an API that is not enabled, or was only just enabled."""
    delay, api = call.cloud.settings.api_delay, call.method.document.partition(".")[0]
    project, service = call.project or call.query.get("project", ""), f"{api}.googleapis.com"
    # The paths of buckets and objects name no project.
    if delay is None or not project or _is_enabled(call, project, service, delay):
        return
    number, title = project_number(project), document(call.method.document)["title"]
    link = f"https://console.developers.google.com/apis/api/{service}/overview?project={number}"
    raise GoogleError(
        "PERMISSION_DENIED",
        f"{title} has not been used in project {number} before or it is disabled. Enable it by visiting {link} then "
        "retry. If you enabled this API recently, wait a few minutes for the action to propagate to our systems and "
        "retry.",
        reason="accessNotConfigured",
        domain="usageLimits",
        details=[
            {
                "@type": "type.googleapis.com/google.rpc.ErrorInfo",
                "reason": "SERVICE_DISABLED",
                "domain": "googleapis.com",
                "metadata": {"service": service, "consumer": f"projects/{number}", "activationUrl": link},
            }
        ]
        if api not in WITHOUT_STATUS
        else None,
    )


# ---------------------------------------------------------------------------------------------- services


def _service(call: Call, project: str, service: str) -> JSON:
    number = project_number(project)
    about = next((document(d) for d in DOCUMENTS if d.startswith(service.partition(".")[0] + ".")), {})
    config = {
        "name": service,
        "title": about.get("title", service),
        "documentation": {"summary": about.get("description", "")},
        "quota": {},
        "authentication": {},
        "usage": {"requirements": ["serviceusage.googleapis.com/tos/cloud"]},
        "monitoring": {},
    }
    return {
        "name": f"projects/{number}/services/{service}",
        "parent": f"projects/{number}",
        "config": config,
        "state": "ENABLED" if _is_enabled(call, project, service) else "DISABLED",
    }


def _operation(call: Call, kind: str, response: JSON, changed: bool) -> JSON:
    """An operation that is done when it is next asked for, or at once where nothing had to be changed."""
    done = {"done": True, "response": {"@type": f"type.googleapis.com/google.api.serviceusage.v1.{kind}", **response}}
    if not changed:
        return {"name": "operations/noop.DONE_OPERATION", **done}
    name = f"operations/acat.p2-{project_number(call.project)}-{uuid.uuid4()}"
    metadata = {"@type": "type.googleapis.com/google.protobuf.Empty"}
    with call.cloud.store.transaction():
        call.cloud.store.put("usage-operation", name, {"name": name, "metadata": metadata, **done})
    return {"name": name}


def _enable(call: Call, names: list[str]) -> bool:
    """Enables APIs. Returns whether one of them was not enabled before."""
    for name in names:
        if not name.endswith(".googleapis.com"):
            raise GoogleError("PERMISSION_DENIED", f"Not found or permission denied for service(s): {name}.")
    new = [name for name in names if not _is_enabled(call, call.project, name)]
    with call.cloud.store.transaction():
        for name in new:
            call.cloud.store.put("service", f"{call.project}/{name}", {"time": clock.time()})
    return bool(new)


async def get_service(call: Call) -> JSON:
    return _service(call, call.project, call.name.rpartition("/")[2])


async def list_services(call: Call) -> JSON:
    """The enabled ones. A list of all that are not enabled would have to name every API of Google's."""
    wanted = call.query.get("filter", "").replace(" ", "").lower()
    if wanted not in ("", "state:enabled"):
        raise unimplemented(f"{call.method.id} with the filter {call.query['filter']}")
    names = {name.partition("/")[2] for name, _ in call.cloud.store.list("service", f"{call.project}/")}
    names |= {f"{api}.googleapis.com" for api in ALWAYS}
    return cut(call, "services", [_service(call, call.project, n) for n in sorted(names)], usual=50, most=200)


async def enable(call: Call) -> JSON:
    service = call.name.rpartition("/")[2]
    changed = _enable(call, [service])
    return _operation(call, "EnableServiceResponse", {"service": _service(call, call.project, service)}, changed)


async def batch_enable(call: Call) -> JSON:
    names = call.body.get("serviceIds", [])
    if not 1 <= len(names) <= 20:
        raise invalid(f"Between 1 and 20 services can be enabled at once; there are {len(names)}.")
    changed = _enable(call, names)
    services = [_service(call, call.project, n) for n in names]
    return _operation(call, "BatchEnableServicesResponse", {"services": services}, changed)


async def disable(call: Call) -> JSON:
    service = call.name.rpartition("/")[2]
    changed = _is_enabled(call, call.project, service)
    with call.cloud.store.transaction():
        call.cloud.store.delete("service", f"{call.project}/{service}")
    return _operation(call, "DisableServiceResponse", {"service": _service(call, call.project, service)}, changed)


async def generate_identity(call: Call) -> JSON:
    """Makes the service agent of an API, which can be granted roles from then on."""
    service = call.name.rpartition("/")[2]
    agent = AGENTS.get(service.removesuffix(".googleapis.com"))
    if not agent or not call.project:
        raise unimplemented(f"{call.method.id} for {call.name}")
    email = agent.format(project_number(call.project)) + ".iam.gserviceaccount.com"
    identity = {"email": email, "uniqueId": make_agent(call.cloud, email)}
    kind = "type.googleapis.com/google.api.serviceusage.v1beta1.ServiceIdentity"
    return {"name": "operations/finished.DONE_OPERATION", "done": True, "response": {"@type": kind, **identity}}


async def get_operation(call: Call) -> JSON:
    if call.name in ("operations/noop.DONE_OPERATION", "operations/finished.DONE_OPERATION"):
        return {"name": call.name, "done": True}
    operation = call.cloud.store.get("usage-operation", call.name)
    if not operation:
        raise not_found(f"Operation {call.name} is not found.")
    return operation


METHODS: dict[str, Any] = {
    "serviceusage.services.get": get_service,
    "serviceusage.services.list": list_services,
    "serviceusage.services.enable": enable,
    "serviceusage.services.batchEnable": batch_enable,
    "serviceusage.services.disable": disable,
    "serviceusage.services.generateServiceIdentity": generate_identity,
    "serviceusage.operations.get": get_operation,
}
