"""The sandbox's audit log: who changed which resource, in the names that Google's audit logs have."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from sandbox_jobs import entries

from sandbox.cloud_logging.audit import NOBODY, method_name
from sandbox.testing import RunningSandbox


def changes(sandbox: RunningSandbox, text: str = "") -> list[tuple[str, str, str]]:
    """(caller, method, resource) of each entry of the audit log that matches a filter, the oldest first."""
    project = sandbox.location.split("/")[1]
    activity = f'logName="projects/{project}/logs/cloudaudit.googleapis.com%2Factivity"'
    said = [entry["protoPayload"] for entry in entries(sandbox, f"{activity} {text}")]
    return [(p["authenticationInfo"]["principalEmail"], p["methodName"], p["resourceName"]) for p in said]


def call(sandbox: RunningSandbox, http: str, path: str, body: Any = None, *, by: str = "") -> httpx.Response:
    headers = {"authorization": f"Bearer sandbox:{by}"} if by else {}
    answer = httpx.request(http, f"{sandbox.url}/{path}", json=body, headers=headers, trust_env=False)
    assert answer.status_code < 500, answer.text
    return answer


def test_a_change_names_its_caller_and_a_read_or_a_refusal_leaves_no_entry(stub_sandbox: RunningSandbox) -> None:
    here = stub_sandbox.project("audited-one")
    location = here.location
    call(here, "POST", f"v1/{location}/endpoints?endpointId=7", {"displayName": "e"}, by="ann@example.com")
    call(here, "PATCH", f"v1/{location}/endpoints/7?updateMask=description", {"description": "mine"})
    call(here, "GET", f"v1/{location}/endpoints/7", by="bob@example.com")
    call(here, "PATCH", f"v1/{location}/endpoints/8?updateMask=description", {"description": "x"}, by="bob@example.com")
    call(here, "POST", f"v1/{location}/endpoints/7:predict", {"instances": []}, by="bob@example.com")
    service = "google.cloud.aiplatform.v1.EndpointService"
    assert changes(here) == [
        ("ann@example.com", f"{service}.CreateEndpoint", f"{location}/endpoints"),
        (NOBODY, f"{service}.UpdateEndpoint", f"{location}/endpoints/7"),
    ]
    assert changes(here, 'protoPayload.resourceName:"endpoints/7"') == changes(here)[1:]


def test_buckets_and_services_have_the_names_of_their_own_audit_logs(stub_sandbox: RunningSandbox) -> None:
    here, by = stub_sandbox.project("audited-two"), "ann@example.com"
    call(here, "POST", "storage/v1/b?project=audited-two", {"name": "audited-two-bucket"}, by=by)
    policy = call(here, "GET", "storage/v1/b/audited-two-bucket/iam").json()
    call(here, "PUT", "storage/v1/b/audited-two-bucket/iam", policy, by=by)
    call(here, "POST", "serviceusage/v1/projects/audited-two/services/iam.googleapis.com:disable", {}, by=by)
    bucket = "projects/_/buckets/audited-two-bucket"
    assert changes(here)[:2] == [(by, "storage.buckets.create", bucket), (by, "storage.setIamPermissions", bucket)]
    _, method, resource = changes(here)[-1]
    assert method == "google.api.serviceusage.v1.ServiceUsage.DisableService"
    assert resource.endswith("/services/iam.googleapis.com")


@pytest.mark.parametrize(
    ("method", "name"),
    [
        (
            "aiplatform.projects.locations.endpoints.deployModel",
            "google.cloud.aiplatform.v1.EndpointService.DeployModel",
        ),
        (
            "aiplatform.projects.locations.models.mergeVersionAliases",
            "google.cloud.aiplatform.v1.ModelService.MergeVersionAliases",
        ),
        ("storage.buckets.setIamPolicy", "storage.setIamPermissions"),
        ("storage.objects.insert", ""),
        ("logging.entries.list", ""),
        ("iam.projects.serviceAccounts.create", "google.iam.admin.v1.CreateServiceAccount"),
        (
            "artifactregistry.projects.locations.repositories.patch",
            "google.devtools.artifactregistry.v1.ArtifactRegistry.UpdateRepository",
        ),
        ("artifactregistry.projects.locations.repositories.getIamPolicy", ""),
    ],
)
def test_methods_have_the_names_of_google_s_audit_logs(method: str, name: str) -> None:
    assert method_name(method, "v1") == name
