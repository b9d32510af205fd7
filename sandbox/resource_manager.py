"""Resource Manager: projects, which exist as soon as they are named, and their policies.

https://cloud.google.com/resource-manager/reference/rest
"""

import re

from sandbox.context import Call
from sandbox.errors import unimplemented
from sandbox.iam import policy_methods
from sandbox.projects import project_number
from sandbox.store import JSON

CREATED = "2026-01-01T00:00:00.000000Z"


def _project_v1(project: str) -> JSON:
    return {
        "projectNumber": project_number(project),
        "projectId": project,
        "lifecycleState": "ACTIVE",
        "name": project,
        "createTime": CREATED,
    }


async def get_project(call: Call) -> JSON:
    project = call.project
    if call.method.version == "v1":
        return _project_v1(project)
    return {
        "name": f"projects/{project_number(project)}",
        "projectId": project,
        "state": "ACTIVE",
        "displayName": project,
        "createTime": CREATED,
        "updateTime": CREATED,
        "etag": "BwY=",
    }


async def list_projects(call: Call) -> JSON:
    """The project of a filter `id:PROJECT`: which other projects the caller may see is not known here."""
    match = re.fullmatch(r"(?:id|projectId)[:=]([a-z][-a-z0-9]{4,28}[a-z0-9])", call.query.get("filter", ""))
    if call.version != "v1" or not match:
        raise unimplemented("listing projects but by v1 with the filter id:PROJECT")
    call.cloud.projects.meet(match[1])
    return {"projects": [_project_v1(match[1])]}


METHODS = {
    "cloudresourcemanager.projects.list": list_projects,
    "cloudresourcemanager.projects.get": get_project,
    **policy_methods("cloudresourcemanager.projects"),
}
