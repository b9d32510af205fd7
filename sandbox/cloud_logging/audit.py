"""The Admin Activity entries of Cloud Audit Logs: one for each change of a resource.

The fields: https://cloud.google.com/logging/docs/reference/audit/auditlog/rest/Shared.Types/AuditLog. The names of
methods are those of each service's page about audit logs, such as
https://cloud.google.com/vertex-ai/docs/general/audit-logging; an operation has one entry here, and two on Google.
"""

import itertools
import re
import time
from typing import Any

from sandbox import oauth2
from sandbox.clock import now
from sandbox.projects import project_number
from sandbox.store import JSON

NOBODY = "unknown@sandbox.invalid"  # a caller whose token names nobody
_STORAGE = {
    "insert": "storage.buckets.create",
    "patch": "storage.buckets.update",
    "update": "storage.buckets.update",
    "delete": "storage.buckets.delete",
    "setIamPolicy": "storage.setIamPermissions",
}
_VERTEX = {
    "endpoints": "EndpointService",
    "models": "ModelService",
    "batchPredictionJobs": "JobService",
    "customJobs": "JobService",
    "hyperparameterTuningJobs": "JobService",
    "tensorboards": "TensorboardService",
    "pipelineJobs": "PipelineService",
    "schedules": "ScheduleService",
}
_ONE = {"repositories": "Repository", "serviceAccounts": "ServiceAccount"}  # others lose their last letter
_SERVICES = {
    "artifactregistry": "google.devtools.artifactregistry.v1.ArtifactRegistry",
    "iam": "google.iam.admin.v1",
    "serviceusage": "google.api.serviceusage.v1.ServiceUsage",
}
# Reads that are POSTs, and requests that Google logs as access to data.
_NO_CHANGE = re.compile(r"\.(getIamPolicy|testIamPermissions|predict|rawPredict|wait|computeTokens)$|^logging\.")
_numbers = itertools.count()


def method_name(id_: str, version: str) -> str:
    """The name that audit logs have for a method, by its id in the discovery documents; "" for one that is no change.

    version: of the API in the request's path.
    """
    api, *path, verb = id_.split(".")
    collection = path[-1] if path else ""
    if api == "storage":
        return _STORAGE.get(verb, "") if collection == "buckets" else ""
    if _NO_CHANGE.search(id_):
        return ""
    one = _ONE.get(collection, collection[:1].upper() + collection[1:-1])
    plain = {"create": f"Create{one}", "patch": f"Update{one}", "delete": f"Delete{one}", "cancel": f"Cancel{one}"}
    plain |= {"pause": f"Pause{one}", "resume": f"Resume{one}"}
    special = {"deleteVersion": "DeleteModelVersion", "upload": "UploadModel", "setIamPolicy": "SetIamPolicy"}
    said = plain.get(verb) or special.get(verb) or verb[:1].upper() + verb[1:]
    if api == "aiplatform":
        service = _VERTEX.get(collection)
        return f"google.cloud.aiplatform.{version or 'v1'}.{service}.{said}" if service else ""
    if api == "serviceusage":
        said = {"enable": "EnableService", "disable": "DisableService"}.get(verb, said)
    return f"{_SERVICES[api]}.{said}" if api in _SERVICES else ""


def resource_name(api: str, name: str) -> str:
    """The name that audit logs have for a resource: a bucket's has no project, a service's the project's number."""
    if api == "storage":
        return "projects/_/buckets/" + name.partition("b/")[2].split("/")[0]
    if api == "serviceusage":
        kind, project, *rest = name.split("/")
        return "/".join([kind, project_number(project), *rest])
    return name


def entry(id_: str, version: str, name: str, project: str, authorization: str) -> JSON | None:
    """The entry of a change that succeeded; None for a request that is no change.

    id_, version: of the method. name: of the resource, as in the path. authorization: the request's header.
    """
    if not (method := method_name(id_, version)):
        return None
    api = id_.partition(".")[0]
    payload: dict[str, Any] = {
        "@type": "type.googleapis.com/google.cloud.audit.AuditLog",
        "authenticationInfo": {"principalEmail": oauth2.caller(authorization) or NOBODY},
        "serviceName": f"{api}.googleapis.com",
        "methodName": method,
        "resourceName": resource_name(api, name),
    }
    return {
        "insertId": f"{time.time_ns():016x}{next(_numbers):08x}",
        "logName": f"projects/{project}/logs/cloudaudit.googleapis.com%2Factivity",
        "resource": {"type": "audited_resource", "labels": {"project_id": project, "service": f"{api}.googleapis.com"}},
        "timestamp": now(),
        "receiveTimestamp": now(),
        "severity": "NOTICE",
        "protoPayload": payload,
    }
