"""IAM, projects, Service Usage and Compute Engine in the sandbox, asked by Google's own clients.

Facts about Google's answers are from public records of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from google_clients import service
from googleapiclient.errors import HttpError

from infra import apis
from sandbox.testing import RunningSandbox

Policy = dict[str, Any]


@pytest.fixture
def accounts(stub_sandbox: RunningSandbox) -> Iterator[Any]:
    with service(stub_sandbox, "iam", "v1") as client:
        yield client.projects().serviceAccounts()


@pytest.fixture
def projects(stub_sandbox: RunningSandbox) -> Iterator[Any]:
    with service(stub_sandbox, "cloudresourcemanager", "v1") as client:
        yield client.projects()


@pytest.fixture
def services(stub_sandbox: RunningSandbox) -> Iterator[Any]:
    with service(stub_sandbox, "serviceusage", "v1") as client:
        yield client.services()


@pytest.fixture
def number(projects: Any, project: str) -> str:
    return str(projects.get(projectId=project).execute()["projectNumber"])


@pytest.fixture
def roles(stub_sandbox: RunningSandbox) -> Iterator[Any]:
    with service(stub_sandbox, "iam", "v1") as client:
        yield client.projects().roles()


def make_account(accounts: Any, project: str, name: str = "serving") -> Any:
    return accounts.create(name=f"projects/{project}", body={"accountId": name}).execute()


def grant(projects: Any, project: str, *members: str, role: str = "roles/viewer", **more: Any) -> Policy:
    """The project's policy after a binding is added."""
    policy = projects.getIamPolicy(resource=project, body={}).execute()
    policy["bindings"] = [*policy.get("bindings", []), {"role": role, "members": list(members)}]
    written: Policy = projects.setIamPolicy(resource=project, body={"policy": policy, **more}).execute()
    return written


# ------------------------------------------------------------------------------------ service accounts


def test_a_service_account_lives(accounts: Any, project: str) -> None:
    parent = f"projects/{project}"
    body = {"accountId": "serving", "serviceAccount": {"displayName": "Serving"}}
    made = accounts.create(name=parent, body=body).execute()
    assert made["email"] == f"serving@{project}.iam.gserviceaccount.com"
    assert accounts.get(name=made["name"]).execute() == made
    assert accounts.get(name=f"projects/-/serviceAccounts/{made['email']}").execute()["email"] == made["email"]
    assert accounts.get(name=f"projects/-/serviceAccounts/{made['uniqueId']}").execute()["email"] == made["email"]
    change = {"serviceAccount": {"displayName": "Other"}, "updateMask": "display_name"}
    assert accounts.patch(name=made["name"], body=change).execute()["displayName"] == "Other"
    assert [a["email"] for a in accounts.list(name=parent).execute()["accounts"]] == [made["email"]]
    accounts.delete(name=made["name"]).execute()
    assert accounts.list(name=parent).execute() == {}
    assert "displayName" not in make_account(accounts, project)


def test_errors_of_iam_have_a_reason_beside_the_status(
    stub_sandbox: RunningSandbox, accounts: Any, project: str
) -> None:
    url = f"{stub_sandbox.url}/iam/v1/projects/{project}/serviceAccounts"
    make_account(accounts, project)
    missing = httpx.get(f"{url}/nobody@{project}.iam.gserviceaccount.com", trust_env=False)
    taken = httpx.post(url, json={"accountId": "serving"}, trust_env=False)
    for answer, status, reason, message in (
        (missing, "NOT_FOUND", "notFound", "Unknown service account"),
        (
            taken,
            "ALREADY_EXISTS",
            "alreadyExists",
            f"Service account serving already exists within project projects/{project}.",
        ),
    ):
        listed = [{"domain": "global", "message": message, "reason": reason}]
        code = answer.status_code
        assert answer.json() == {"error": {"code": code, "message": message, "status": status, "errors": listed}}


def test_a_new_account_is_missed_on_and_off_for_a_while(tmp_path: Path, project: str) -> None:
    with (
        RunningSandbox("--account-delay", "60", state=tmp_path / "state") as running,
        service(running, "iam", "v1") as iam,
        service(running, "cloudresourcemanager", "v1") as resource_manager,
    ):
        accounts, projects = iam.projects().serviceAccounts(), resource_manager.projects()
        made = make_account(accounts, project)

        said: list[str] = []

        def sees() -> bool:
            try:
                return bool(accounts.get(name=made["name"]).execute() == made)
            except HttpError as refusal:
                said.append(refusal.reason)
                return False

        assert [sees() for _ in range(4)] == [False, True, False, True]
        assert set(said) == {f"Service account {made['name']} does not exist."}
        with pytest.raises(HttpError, match="already exists"):
            make_account(accounts, project)
        with pytest.raises(HttpError, match=f"Service account {made['email']} does not exist"):
            grant(projects, project, f"serviceAccount:{made['email']}")
        assert grant(projects, project, f"serviceAccount:{made['email']}")["bindings"]
        running.advance(60)
        assert all(sees() for _ in range(3))


# ------------------------------------------------------------------------------------------- policies


def test_bindings_of_a_deleted_account_say_so_and_are_taken_back(accounts: Any, projects: Any, project: str) -> None:
    made = make_account(accounts, project)
    member = f"serviceAccount:{made['email']}"
    grant(projects, project, member, "user:a@example.com")
    accounts.delete(name=made["name"]).execute()
    deleted = f"deleted:{member}?uid={made['uniqueId']}"
    policy = projects.getIamPolicy(resource=project, body={}).execute()
    assert policy["bindings"] == [{"role": "roles/viewer", "members": [deleted, "user:a@example.com"]}]
    assert projects.setIamPolicy(resource=project, body={"policy": policy}).execute()["bindings"] == policy["bindings"]
    with pytest.raises(HttpError, match="does not exist"):
        grant(projects, project, member)
    again = make_account(accounts, project)
    assert again["uniqueId"] != made["uniqueId"]
    assert grant(projects, project, member)["bindings"][0]["members"] == [deleted, member, "user:a@example.com"]


@pytest.mark.parametrize(
    "email",
    [
        "service-{}@compute-system.iam.gserviceaccount.com",
        "service-{}@container-engine-robot.iam.gserviceaccount.com",
        "service-{}@gs-project-accounts.iam.gserviceaccount.com",
        "service-{}@serverless-robot-prod.iam.gserviceaccount.com",
        "service-{}@gcp-sa-pubsub.iam.gserviceaccount.com",
        "service-org-{}@gcp-sa-pam.iam.gserviceaccount.com",
        "bq-{}@bigquery-encryption.iam.gserviceaccount.com",
        "{}@cloudservices.gserviceaccount.com",
        "{}-compute@developer.gserviceaccount.com",
        "service-999999999999@gcp-sa-aiplatform.iam.gserviceaccount.com",  # of a project that is not the sandbox's
    ],
)
def test_googles_own_accounts_can_be_granted_roles(projects: Any, project: str, number: str, email: str) -> None:
    member = f"serviceAccount:{email.format(number)}"
    assert grant(projects, project, member)["bindings"] == [{"role": "roles/viewer", "members": [member]}]


@pytest.mark.parametrize("name", ["nobody", "service-123456789012"])
def test_an_account_that_nobody_made_is_granted_none(projects: Any, project: str, number: str, name: str) -> None:
    for place in (project, "never-named-project"):
        if name == "nobody" or place == project:
            with pytest.raises(HttpError, match="does not exist"):
                grant(projects, project, f"serviceAccount:{name}@{place}.iam.gserviceaccount.com")


def test_vertex_ais_agent_is_granted_roles_once_it_is_made(
    stub_sandbox: RunningSandbox, projects: Any, project: str, number: str
) -> None:
    member = f"serviceAccount:service-{number}@gcp-sa-aiplatform.iam.gserviceaccount.com"
    with pytest.raises(HttpError, match="does not exist"):
        grant(projects, project, member)
    with service(stub_sandbox, "serviceusage", "v1beta1") as usage:
        parent = f"projects/{project}/services/aiplatform.googleapis.com"
        operation = usage.services().generateServiceIdentity(parent=parent).execute()
        assert operation == {
            "name": "operations/finished.DONE_OPERATION",
            "done": True,
            "response": {
                "@type": "type.googleapis.com/google.api.serviceusage.v1beta1.ServiceIdentity",
                "email": member.removeprefix("serviceAccount:"),
                "uniqueId": operation["response"]["uniqueId"],
            },
        }
        assert usage.services().generateServiceIdentity(parent=parent).execute() == operation
        with pytest.raises(HttpError, match=r"does not implement serviceusage\.services\.generateServiceIdentity"):
            usage.services().generateServiceIdentity(parent=f"projects/{project}/services/x.googleapis.com").execute()
    assert grant(projects, project, member)["bindings"][0]["members"] == [member]


def test_a_policy_that_was_never_set_has_an_etag_alone(accounts: Any, projects: Any, project: str) -> None:
    assert projects.getIamPolicy(resource=project, body={}).execute() == {"etag": "ACAB"}
    account = make_account(accounts, project)["name"]
    assert accounts.getIamPolicy(resource=account).execute() == {"etag": "ACAB"}
    empty = projects.setIamPolicy(resource=project, body={"policy": {"etag": "ACAB"}}).execute()
    assert set(empty) == {"etag", "version"}


def test_audit_configurations_change_only_where_the_mask_names_them(projects: Any, project: str) -> None:
    audit = [{"service": "allServices", "auditLogConfigs": [{"logType": "DATA_READ"}]}]
    body: Any = {"policy": {"auditConfigs": audit, "version": 3}, "updateMask": "bindings,etag,auditConfigs"}
    assert projects.setIamPolicy(resource=project, body=body).execute()["auditConfigs"] == audit
    grant(projects, project, "user:a@example.com")
    ignored: Any = {"auditConfigs": [], "bindings": [{"role": "roles/viewer", "members": ["user:b@example.com"]}]}
    kept = projects.setIamPolicy(resource=project, body={"policy": ignored}).execute()
    assert (kept["auditConfigs"], kept["bindings"]) == (audit, ignored["bindings"])
    assert kept["version"] == 1  # whatever was sent
    emptied = {"policy": {"bindings": kept["bindings"]}, "updateMask": "bindings,etag,auditConfigs"}
    assert "auditConfigs" not in projects.setIamPolicy(resource=project, body=emptied).execute()


def test_a_condition_makes_a_policy_version_3(projects: Any, project: str) -> None:
    condition = {"title": "until", "expression": 'request.time < timestamp("2030-01-01T00:00:00Z")'}
    binding = {"role": "roles/viewer", "members": ["user:a@example.com"], "condition": condition}
    plain = {"role": "roles/viewer", "members": ["user:a@example.com"]}
    policy = {"version": 3, "bindings": [binding, plain]}
    written = projects.setIamPolicy(resource=project, body={"policy": policy}).execute()
    assert (written["version"], len(written["bindings"])) == (3, 2)


def test_a_policy_that_changed_meanwhile_is_not_overwritten(projects: Any, project: str) -> None:
    read = projects.getIamPolicy(resource=project, body={}).execute()
    grant(projects, project, "user:a@example.com")
    with pytest.raises(HttpError, match="concurrent policy changes"):
        projects.setIamPolicy(resource=project, body={"policy": read}).execute()


# ------------------------------------------------------------------------------------------- projects


def test_a_project_is_the_same_in_both_versions(stub_sandbox: RunningSandbox, projects: Any, project: str) -> None:
    old = projects.get(projectId=project).execute()
    with service(stub_sandbox, "cloudresourcemanager", "v3") as client:
        new = client.projects().get(name=f"projects/{project}").execute()
        assert new == client.projects().get(name=f"projects/{old['projectNumber']}").execute()
    assert old["lifecycleState"] == new["state"] == "ACTIVE"
    assert new["name"] == f"projects/{old['projectNumber']}"


def test_a_number_is_a_project_only_once_its_id_was_named(stub_sandbox: RunningSandbox, project: str) -> None:
    by_number = f"v1/projects/{'9' * 12}/locations/europe-west4/endpoints"
    status, answer = stub_sandbox.ask("POST", by_number, {"displayName": "people"})
    assert (status, answer["error"]["status"]) == (403, "PERMISSION_DENIED")
    assert "names the project by its id" in answer["error"]["message"]

    by_id = f"v1/projects/{project}/locations/europe-west4/endpoints"
    made = stub_sandbox.do("POST", by_id, {"displayName": "people"}, endpointId="1")["response"]
    assert made["name"].split("/")[1].isdigit()
    (found,) = stub_sandbox.do("GET", f"v1/{made['name'].rpartition('/')[0]}")["endpoints"]
    assert found["name"] == made["name"]
    stub_sandbox.do("DELETE", f"v1/{made['name']}")
    assert stub_sandbox.do("GET", by_id) == {}


# --------------------------------------------------------------------------------------- service usage


def test_services_are_enabled_and_disabled_by_operations(
    stub_sandbox: RunningSandbox, services: Any, project: str, number: str
) -> None:
    name = f"projects/{project}/services/aiplatform.googleapis.com"
    assert services.get(name=name).execute()["state"] == "DISABLED"
    with service(stub_sandbox, "serviceusage", "v1beta1") as beta:
        for change, kind, state in (
            (services.enable, "EnableServiceResponse", "ENABLED"),
            (services.disable, "DisableServiceResponse", "DISABLED"),
        ):
            started = change(name=name, body={}).execute()
            assert set(started) == {"name"}
            assert started["name"].startswith("operations/acat.")
            ended = beta.operations().get(name=started["name"]).execute()
            assert ended["done"]
            assert ended["metadata"] == {"@type": "type.googleapis.com/google.protobuf.Empty"}
            assert ended["response"]["@type"] == f"type.googleapis.com/google.api.serviceusage.v1.{kind}"
            shown = ended["response"]["service"]
            assert shown == services.get(name=name).execute()
            assert (shown["name"], shown["state"]) == (
                f"projects/{number}/services/aiplatform.googleapis.com",
                state,
            )
            assert shown["config"]["title"] == "Agent Platform API"
    again = services.disable(name=name, body={}).execute()
    assert (again["name"], again["done"]) == ("operations/noop.DONE_OPERATION", True)


def test_enabled_services_are_listed_in_pages_of_the_fields_asked_for(services: Any, project: str, number: str) -> None:
    parent, ids = f"projects/{project}", [f"{api}.googleapis.com" for api in ("run", "storage")]
    services.batchEnable(parent=parent, body={"serviceIds": ids}).execute()
    asked: dict[str, Any] = {"parent": parent, "filter": "state:ENABLED", "fields": "services/name,nextPageToken"}
    first = services.list(**asked, pageSize=4).execute()
    second = services.list(**asked, pageSize=4, pageToken=first["nextPageToken"]).execute()
    names = [s["name"].rpartition("/")[2].partition(".")[0] for s in first["services"] + second["services"]]
    assert names == ["cloudresourcemanager", "compute", "run", "serviceusage", "storage"]
    assert first["services"][0] == {"name": f"projects/{number}/services/cloudresourcemanager.googleapis.com"}
    assert "nextPageToken" not in second


def test_an_api_that_is_not_enabled_refuses_until_a_while_after_it_was(tmp_path: Path, project: str) -> None:
    with RunningSandbox("--api-delay", "60", state=tmp_path / "state") as running:
        location = f"projects/{project}/locations/europe-west4"
        number = httpx.get(f"{running.url}/cloudresourcemanager/v1/projects/{project}").json()["projectNumber"]
        # One good answer of each kind of error: Vertex AI's and, without a status or details, Storage's.
        urls = {
            "aiplatform": f"{running.url}/v1/{location}/models",
            "storage": f"{running.url}/storage/v1/b?project={project}",
        }
        refusals = {api: httpx.get(url, trust_env=False) for api, url in urls.items()}
        link = "https://console.developers.google.com/apis/api/aiplatform.googleapis.com/overview?project="
        refused = refusals["aiplatform"].json()["error"]
        assert (refused["code"], refused["status"]) == (403, "PERMISSION_DENIED")
        assert refused["message"].startswith(
            f"Agent Platform API has not been used in project {number} before or it is disabled. Enable it by visiting "
            f"{link}{number} then retry."
        )
        assert refused["details"][0]["reason"] == "SERVICE_DISABLED"
        old = refusals["storage"].json()["error"]
        assert set(old) == {"code", "message", "errors"}
        assert (old["errors"][0]["domain"], old["errors"][0]["reason"]) == ("usageLimits", "accessNotConfigured")
        assert [apis._disabled_for(url, "sandbox") for url in urls.values()] == [f"projects/{number}", ""]

        with service(running, "serviceusage", "v1") as client:
            ids = [f"{api}.googleapis.com" for api in urls]
            client.services().batchEnable(parent=f"projects/{project}", body={"serviceIds": ids}).execute()
        assert [apis._disabled_for(url, "sandbox") for url in urls.values()] == [f"projects/{number}", ""]
        running.advance(60)
        assert [apis._disabled_for(url, "sandbox") for url in urls.values()] == [None, None]


# ---------------------------------------------------------------------------------------------- others


def test_compute_lists_regions(stub_sandbox: RunningSandbox, project: str) -> None:
    answer = httpx.get(f"{stub_sandbox.url}/compute/v1/projects/{project}/regions", trust_env=False).json()
    assert "europe-west4" in {r["name"] for r in answer["items"]}


@pytest.mark.parametrize(
    ("http", "path", "method"),
    [
        ("GET", "compute/v1/projects/p/zones", "compute.zones.list"),
        ("POST", "storage/v1/b/x/lockRetentionPolicy", "storage.buckets.lockRetentionPolicy"),
        ("GET", "iam/v1/roles", "iam.roles.list"),
        ("GET", "cloudresourcemanager/v3/folders", "cloudresourcemanager.folders.list"),
        ("GET", "artifactregistry/v1/projects/p/locations/l", "artifactregistry.projects.locations.get"),
    ],
)
def test_what_is_not_implemented_says_so(stub_sandbox: RunningSandbox, http: str, path: str, method: str) -> None:
    answer = httpx.request(http, f"{stub_sandbox.url}/{path}", trust_env=False)
    assert answer.status_code == 501
    assert f"does not implement {method}" in answer.json()["error"]["message"]


# ------------------------------------------------------------------------------ custom roles and endpoints

PREDICTOR = {"title": "Predictor", "includedPermissions": ["aiplatform.endpoints.predict"], "stage": "GA"}


def test_a_custom_role_can_be_changed_deleted_and_undeleted(roles: Any, project: str) -> None:
    parent, name = f"projects/{project}", f"projects/{project}/roles/predictor"
    made = roles.create(parent=parent, body={"roleId": "predictor", "role": PREDICTOR}).execute()
    assert made == PREDICTOR | {"name": name, "etag": made["etag"]}
    renamed = roles.patch(name=name, updateMask="title", body={"title": "Asks", "stage": "BETA"}).execute()
    assert (renamed["title"], renamed["stage"]) == ("Asks", "GA")
    with pytest.raises(HttpError, match="concurrent"):
        roles.patch(name=name, body={"title": "x", "etag": made["etag"]}).execute()
    with pytest.raises(HttpError, match="already exists"):
        roles.create(parent=parent, body={"roleId": "predictor", "role": PREDICTOR}).execute()
    assert set(roles.list(parent=parent).execute()["roles"][0]) == {"title", "stage", "name", "etag"}
    assert roles.delete(name=name).execute()["deleted"]
    assert roles.list(parent=parent).execute() == {}
    with pytest.raises(HttpError, match="marked for deletion"):
        roles.create(parent=parent, body={"roleId": "predictor", "role": PREDICTOR}).execute()
    assert "deleted" not in roles.undelete(name=name, body={}).execute()
    assert roles.get(name=name).execute()["title"] == "Asks"
    with pytest.raises(HttpError, match="was not found"):
        roles.get(name=name + "s").execute()


def test_who_may_predict_is_granted_on_an_endpoint_alone(
    stub_sandbox: RunningSandbox, roles: Any, project: str
) -> None:
    parent, member = f"projects/{project}/locations/europe-west4", "user:analyst@example.com"
    role = f"projects/{project}/roles/predictor"
    with service(stub_sandbox, "aiplatform", "v1beta1") as client:
        endpoints = client.projects().locations().endpoints()
        wanted = {"policy": {"bindings": [{"role": role, "members": [member]}]}}
        with pytest.raises(HttpError, match="is not found"):
            endpoints.getIamPolicy(resource=f"{parent}/endpoints/people").execute()
        stub_sandbox.done(
            endpoints.create(parent=parent, endpointId="people", body={"displayName": "people"}).execute()
        )
        with pytest.raises(HttpError, match="does not exist in the resource's hierarchy"):
            endpoints.setIamPolicy(resource=f"{parent}/endpoints/people", body=wanted).execute()
        roles.create(parent=f"projects/{project}", body={"roleId": "predictor", "role": PREDICTOR}).execute()
        endpoints.setIamPolicy(resource=f"{parent}/endpoints/people", body=wanted).execute()
        policy = endpoints.getIamPolicy(resource=f"{parent}/endpoints/people").execute()
        assert policy["bindings"] == wanted["policy"]["bindings"]
