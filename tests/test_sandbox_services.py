"""Google's own client libraries, unchanged, against the sandbox's Storage, Artifact Registry, IAM and projects."""

import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import docker
import httpx
import pytest
from google.api_core import exceptions
from google.api_core.client_options import ClientOptions
from google.auth.credentials import AnonymousCredentials
from google.cloud import storage  # type: ignore[attr-defined]
from google.cloud.artifactregistry_v1 import ArtifactRegistryClient, Repository
from googleapiclient import discovery
from googleapiclient.errors import HttpError

from sandbox.artifact_registry import registry
from sandbox.testing import RunningSandbox

PROJECT = "my-project"
LOCATION = f"projects/{PROJECT}/locations/europe-west4"


@pytest.fixture(scope="module")
def sandbox() -> Iterator[RunningSandbox]:
    with RunningSandbox("--registry-port", "0") as running:
        yield running
        assert running.violations() == []


@pytest.fixture
def bucket(sandbox: RunningSandbox) -> Iterator[storage.Bucket]:
    client = storage.Client(
        project=PROJECT,
        credentials=AnonymousCredentials(),  # type: ignore[no-untyped-call]
        client_options={"api_endpoint": sandbox.url},
    )
    bucket = client.bucket(f"bucket-{uuid.uuid4().hex}")
    bucket.versioning_enabled = True
    bucket.iam_configuration.uniform_bucket_level_access_enabled = True
    bucket.iam_configuration.public_access_prevention = "enforced"
    bucket.create(location="europe-west4")
    yield bucket
    for blob in list(client.list_blobs(bucket, versions=True)):
        bucket.delete_blob(blob.name, generation=blob.generation)
    bucket.delete()


def service(sandbox: RunningSandbox, name: str, version: str) -> discovery.Resource:
    """Google's discovery-based client, which takes every address from the document."""
    return discovery.build(
        name,
        version,
        credentials=AnonymousCredentials(),  # type: ignore[no-untyped-call]
        client_options=ClientOptions(api_endpoint=f"{sandbox.url}/{name}/"),
        static_discovery=True,
    )


# ------------------------------------------------------------------------------------------- storage


def test_a_bucket_is_read_as_it_was_made(bucket: storage.Bucket) -> None:
    bucket.labels = {"stack": "dev"}
    bucket.patch()
    bucket.reload()
    assert bucket.labels == {"stack": "dev"}
    assert bucket.versioning_enabled
    assert bucket.location == "EUROPE-WEST4"
    assert bucket.iam_configuration.uniform_bucket_level_access_enabled
    bucket.labels = {}
    bucket.patch()
    bucket.reload()
    assert bucket.labels == {}


@pytest.mark.parametrize(
    "name", ["a.jpg", "folder/b c.jpg", "ü/?#%.txt", "a/b/../c"], ids=["plain", "folder", "odd", "dots"]
)
@pytest.mark.parametrize("size", [0, 5, 1000, 9 * 2**20], ids=["empty", "small", "kilobyte", "resumable"])
def test_an_object_comes_back_whole(bucket: storage.Bucket, name: str, size: int) -> None:
    content = os.urandom(size)
    blob = bucket.blob(name, chunk_size=2**20 if size > 2**20 else None)
    blob.upload_from_string(content, content_type="image/jpeg")
    again = bucket.blob(name)
    assert again.download_as_bytes() == content
    again.reload()
    assert (again.size, again.content_type) == (size, "image/jpeg")
    assert [b.name for b in bucket.client.list_blobs(bucket)] == [name]


def test_content_that_looks_like_a_multipart_boundary_is_kept(bucket: storage.Bucket) -> None:
    content = b"\r\n--==\r\n\r\n--\n\n" * 3 + b"\r\n"
    bucket.blob("x").upload_from_string(content)
    assert bucket.blob("x").download_as_bytes() == content


def test_part_of_an_object_can_be_read(bucket: storage.Bucket) -> None:
    bucket.blob("x").upload_from_string(b"0123456789")
    assert bucket.blob("x").download_as_bytes(start=2, end=4) == b"234"


def test_a_replaced_and_a_deleted_object_stay_as_generations(bucket: storage.Bucket) -> None:
    bucket.blob("x").upload_from_string(b"one")
    first = bucket.get_blob("x").generation
    bucket.blob("x").upload_from_string(b"two")
    bucket.blob("x").delete()
    assert bucket.get_blob("x") is None
    assert list(bucket.client.list_blobs(bucket)) == []
    assert len(list(bucket.client.list_blobs(bucket, versions=True))) == 2
    assert bucket.blob("x", generation=first).download_as_bytes() == b"one"


def test_folders_are_prefixes(bucket: storage.Bucket) -> None:
    for name in ("a/1", "a/2", "b/1", "top"):
        bucket.blob(name).upload_from_string(b"")
    listing = bucket.client.list_blobs(bucket, delimiter="/")
    assert [b.name for b in listing] == ["top"]
    assert listing.prefixes == {"a/", "b/"}
    assert [b.name for b in bucket.client.list_blobs(bucket, prefix="a/", page_size=1)] == ["a/1", "a/2"]


def test_a_precondition_that_does_not_hold_changes_nothing(bucket: storage.Bucket) -> None:
    bucket.blob("x").upload_from_string(b"one", if_generation_match=0)
    with pytest.raises(exceptions.PreconditionFailed):
        bucket.blob("x").upload_from_string(b"two", if_generation_match=0)
    assert bucket.blob("x").download_as_bytes() == b"one"


def test_a_bucket_with_objects_is_not_deleted(bucket: storage.Bucket) -> None:
    bucket.blob("x").upload_from_string(b"")
    with pytest.raises(exceptions.Conflict):
        bucket.delete()


def test_nobody_makes_a_protected_bucket_public(bucket: storage.Bucket) -> None:
    policy = bucket.get_iam_policy(requested_policy_version=3)
    policy.bindings.append({"role": "roles/storage.objectViewer", "members": {"user:a@example.com"}})
    bucket.set_iam_policy(policy)
    bound = {b["role"]: set(b["members"]) for b in bucket.get_iam_policy().bindings}
    assert bound["roles/storage.objectViewer"] == {"user:a@example.com"}
    policy = bucket.get_iam_policy()
    policy.bindings.append({"role": "roles/storage.objectViewer", "members": {"allUsers"}})
    with pytest.raises(exceptions.PreconditionFailed, match="public access prevention"):
        bucket.set_iam_policy(policy)


def test_a_bucket_and_an_object_that_are_not_there_are_not_found(bucket: storage.Bucket) -> None:
    with pytest.raises(exceptions.NotFound):
        bucket.blob("nothing").download_as_bytes()
    with pytest.raises(exceptions.NotFound):
        bucket.client.get_bucket("no-such-bucket")
    with pytest.raises(exceptions.BadRequest, match="Invalid bucket name"):
        bucket.client.create_bucket("my-google-bucket")


def test_objects_survive_a_kill(tmp_path: Path) -> None:
    with RunningSandbox(state=tmp_path / "state") as running:
        options = {"api_endpoint": running.url}
        client = storage.Client(PROJECT, AnonymousCredentials(), client_options=options)  # type: ignore[no-untyped-call]
        client.create_bucket("kept").blob("x").upload_from_string(b"kept")
        running.kill()
        running.start()
        assert client.bucket("kept").blob("x").download_as_bytes() == b"kept"


# --------------------------------------------------------------------------------- artifact registry


@pytest.mark.needs("registry")
def test_a_repository_is_where_images_can_be_pushed_and_leaves_nothing(sandbox: RunningSandbox) -> None:
    client = ArtifactRegistryClient(
        credentials=AnonymousCredentials(),  # type: ignore[no-untyped-call]
        transport="rest",
        client_options=ClientOptions(api_endpoint=f"{sandbox.url}/artifactregistry"),
    )
    made = client.create_repository(
        parent=LOCATION,
        repository_id="images",
        repository=Repository(format_=Repository.Format.DOCKER, labels={"stack": "dev"}),
    ).result(timeout=30)  # type: ignore[no-untyped-call]
    assert made.name == f"{LOCATION}/repositories/images"
    assert [r.name for r in client.list_repositories(parent=LOCATION)] == [made.name]
    pushes = httpx.Client(base_url=f"http://{made.registry_uri.partition('/')[0]}/v2/", trust_env=False)
    assert pushes.get("").status_code == 200

    digest = push(pushes, f"{PROJECT}/images/headcount", "latest")
    (found,) = client.list_docker_images(parent=made.name)
    assert found.uri == f"{made.registry_uri}/headcount@{digest}"
    assert found.tags == ["latest"]

    client.delete_repository(name=made.name).result(timeout=30)  # type: ignore[no-untyped-call]
    with pytest.raises(exceptions.NotFound):
        client.get_repository(name=made.name)
    with pytest.raises(httpx.ConnectError):
        pushes.get("")
    assert not (sandbox.state / "registry").exists()


@pytest.mark.slow
@pytest.mark.needs("docker", "registry_image")
def test_without_the_program_the_registry_is_a_container_that_a_kill_does_not_lose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    state = uuid.uuid4().hex[:12]
    first = registry.Registry(tmp_path, 0, state)
    first.start()
    client = httpx.Client(base_url=f"http://{first.address}/v2/", trust_env=False)
    for repository in ("one", "two"):
        push(client, f"{PROJECT}/{repository}/headcount", "latest")

    second = registry.Registry(tmp_path, int(first.address.partition(":")[2]), state)
    second.start()
    assert len(second.images(f"{PROJECT}/two")) == 1
    second.remove(f"{PROJECT}/one")
    assert second.images(f"{PROJECT}/one") == []
    assert len(second.images(f"{PROJECT}/two")) == 1
    second.remove("")
    names = docker.from_env().volumes.list(), docker.from_env().containers.list(all=True)
    assert state not in "".join(str(item.name) for items in names for item in items)


def push(client: httpx.Client, name: str, tag: str) -> str:
    """An image without layers, as the distribution protocol has it; returns its digest."""
    config = b"{}"
    digest = f"sha256:{hashlib.sha256(config).hexdigest()}"
    upload = client.post(f"{name}/blobs/uploads/").headers["location"]
    assert client.put(f"{upload}&digest={digest}", content=config).status_code == 201
    media = "application/vnd.oci.image.manifest.v1+json"
    manifest = {
        "schemaVersion": 2,
        "mediaType": media,
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": digest, "size": len(config)},
        "layers": [],
    }
    answer = client.put(f"{name}/manifests/{tag}", content=json.dumps(manifest), headers={"content-type": media})
    assert answer.status_code == 201, answer.text
    return str(answer.headers["docker-content-digest"])


def test_other_formats_are_not_pretended(sandbox: RunningSandbox) -> None:
    answer = httpx.post(
        f"{sandbox.url}/artifactregistry/v1/{LOCATION}/repositories?repositoryId=x", json={"format": "PYTHON"}
    )
    assert answer.status_code == 501
    assert "repositories.create with format PYTHON" in answer.json()["error"]["message"]


# ----------------------------------------------------------------------------------- IAM and projects


def test_a_service_account_lives_and_its_bindings_need_it(sandbox: RunningSandbox, bucket: storage.Bucket) -> None:
    accounts = service(sandbox, "iam", "v1").projects().serviceAccounts()
    parent = f"projects/{PROJECT}"
    made = accounts.create(
        name=parent, body={"accountId": "serving", "serviceAccount": {"displayName": "Serving"}}
    ).execute()
    assert made["email"] == f"serving@{PROJECT}.iam.gserviceaccount.com"
    assert accounts.get(name=made["name"]).execute()["displayName"] == "Serving"
    assert accounts.get(name=f"projects/-/serviceAccounts/{made['email']}").execute()["email"] == made["email"]
    body = {"serviceAccount": {"displayName": "Other"}, "updateMask": "display_name"}
    assert accounts.patch(name=made["name"], body=body).execute()["displayName"] == "Other"
    assert [a["email"] for a in accounts.list(name=parent).execute()["accounts"]] == [made["email"]]

    policy = bucket.get_iam_policy()
    policy.bindings.append({"role": "roles/storage.objectViewer", "members": {f"serviceAccount:{made['email']}"}})
    bucket.set_iam_policy(policy)

    with pytest.raises(HttpError, match="already exists"):
        accounts.create(name=parent, body={"accountId": "serving"}).execute()
    accounts.delete(name=made["name"]).execute()
    with pytest.raises(HttpError, match="Unknown service account"):
        accounts.get(name=made["name"]).execute()
    with pytest.raises(exceptions.BadRequest, match="does not exist"):
        bucket.set_iam_policy(bucket.get_iam_policy())


def test_a_policy_that_changed_meanwhile_is_not_overwritten(sandbox: RunningSandbox) -> None:
    projects = service(sandbox, "cloudresourcemanager", "v1").projects()
    read = projects.getIamPolicy(resource=PROJECT, body={}).execute()
    read["bindings"] = [{"role": "roles/viewer", "members": ["user:a@example.com"]}]
    written = projects.setIamPolicy(resource=PROJECT, body={"policy": read}).execute()
    assert written["bindings"] == read["bindings"]
    with pytest.raises(HttpError, match="concurrent policy changes"):
        projects.setIamPolicy(resource=PROJECT, body={"policy": read}).execute()


def test_a_project_is_what_resource_manager_says_in_both_versions(sandbox: RunningSandbox) -> None:
    old = service(sandbox, "cloudresourcemanager", "v1").projects().get(projectId=PROJECT).execute()
    new = service(sandbox, "cloudresourcemanager", "v3").projects().get(name=f"projects/{PROJECT}").execute()
    assert old["lifecycleState"] == new["state"] == "ACTIVE"
    assert new["name"] == f"projects/{old['projectNumber']}"


def test_services_are_enabled_and_disabled(sandbox: RunningSandbox) -> None:
    services = service(sandbox, "serviceusage", "v1").services()
    name = f"projects/{PROJECT}/services/aiplatform.googleapis.com"
    assert services.get(name=name).execute()["state"] == "DISABLED"
    operation = services.enable(name=name, body={}).execute()
    assert operation["response"]["service"]["state"] == "ENABLED"
    listed = services.list(parent=f"projects/{PROJECT}", filter="state:ENABLED").execute()["services"]
    assert "aiplatform.googleapis.com" in {s["config"]["name"] for s in listed}
    services.disable(name=name, body={}).execute()
    assert services.get(name=name).execute()["state"] == "DISABLED"


def test_compute_lists_regions(sandbox: RunningSandbox) -> None:
    answer = httpx.get(f"{sandbox.url}/compute/v1/projects/{PROJECT}/regions").json()
    assert "europe-west4" in {r["name"] for r in answer["items"]}


@pytest.mark.parametrize(
    ("http", "path", "method"),
    [
        ("GET", f"compute/v1/projects/{PROJECT}/zones", "compute.zones.list"),
        ("POST", "storage/v1/b/x/lockRetentionPolicy", "storage.buckets.lockRetentionPolicy"),
        ("GET", f"iam/v1/projects/{PROJECT}/roles", "iam.projects.roles.list"),
        ("GET", "cloudresourcemanager/v3/folders", "cloudresourcemanager.folders.list"),
        ("GET", f"artifactregistry/v1/{LOCATION}", "artifactregistry.projects.locations.get"),
    ],
)
def test_what_is_not_implemented_says_so(sandbox: RunningSandbox, http: str, path: str, method: str) -> None:
    answer = httpx.request(http, f"{sandbox.url}/{path}")
    assert answer.status_code == 501
    assert f"does not implement {method}" in answer.json()["error"]["message"]


def test_an_api_that_is_not_enabled_refuses_and_after_a_while_does_not(tmp_path: Path) -> None:
    with RunningSandbox("--api-delay", "0.3", state=tmp_path / "state") as running:
        models = f"{running.url}/v1/{LOCATION}/models"
        refused = httpx.get(models)
        assert refused.status_code == 403
        assert refused.json()["error"]["details"][0]["reason"] == "SERVICE_DISABLED"
        services = service(running, "serviceusage", "v1").services()
        services.enable(name=f"projects/{PROJECT}/services/aiplatform.googleapis.com", body={}).execute()
        assert httpx.get(models).status_code == 403
        time.sleep(0.4)
        assert httpx.get(models).status_code == 200
