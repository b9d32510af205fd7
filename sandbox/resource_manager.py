"""Resource Manager: projects, which exist as soon as they are named, and their policies.

https://cloud.google.com/resource-manager/reference/rest
"""

from sandbox.context import Call
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


METHODS = {
    "cloudresourcemanager.projects.get": get_project,
    **policy_methods("cloudresourcemanager.projects"),
}
