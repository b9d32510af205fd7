"""Cloud Storage in the sandbox, asked by Google's own client, and its answers as public records show Google's."""

from __future__ import annotations

import datetime
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import google.cloud.storage as storage
import httpx
import pytest
from google.api_core import exceptions
from google_clients import storage_client

from sandbox.testing import RunningSandbox


@pytest.fixture
def client(stub_sandbox: RunningSandbox, project: str) -> Iterator[storage.Client]:
    with storage_client(stub_sandbox, project) as client:
        yield client


@pytest.fixture
def bucket(client: storage.Client) -> Iterator[storage.Bucket]:
    bucket = client.bucket(f"bucket-{uuid.uuid4().hex}")
    bucket.versioning_enabled = True
    bucket.iam_configuration.uniform_bucket_level_access_enabled = True
    bucket.iam_configuration.public_access_prevention = "enforced"
    bucket.create(location="europe-west4")
    yield bucket
    for blob in list(client.list_blobs(bucket, versions=True)):
        bucket.delete_blob(blob.name, generation=blob.generation)
    bucket.delete()


@pytest.fixture
def rest(stub_sandbox: RunningSandbox) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"{stub_sandbox.url}/storage/v1", trust_env=False, timeout=60) as client:
        yield client


def insert(rest: httpx.Client, project: str, **fields: Any) -> Any:
    """A new bucket as the API shows it."""
    body = {"name": f"b-{uuid.uuid4().hex}", **fields}
    answer = rest.post("b", params={"project": project}, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def refusal(answer: httpx.Response) -> tuple[int, str]:
    """Status and reason of an error, whose shape is checked."""
    error = answer.json()["error"]
    (entry,) = error["errors"]
    assert set(error) == {"code", "message", "errors"}
    assert (error["code"], entry["message"], entry["domain"]) == (answer.status_code, error["message"], "global")
    return answer.status_code, entry["reason"]


# ------------------------------------------------------------------------------------------- buckets


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


def test_a_regional_bucket_has_what_google_adds(rest: httpx.Client, project: str) -> None:
    uniform = {"uniformBucketLevelAccess": {"enabled": True}}
    made = insert(rest, project, location="europe-west4", iamConfiguration=uniform, lifecycle={"rule": []})
    assert set(made) == {
        *("kind", "id", "name", "selfLink", "projectNumber", "generation", "metageneration", "timeCreated", "updated"),
        *("location", "locationType", "storageClass", "etag", "iamConfiguration", "softDeletePolicy", "satisfiesPZI"),
    }
    assert (made["etag"], made["metageneration"], made["locationType"]) == ("CAE=", "1", "region")
    created = datetime.datetime.fromisoformat(made["timeCreated"])
    assert created.microsecond % 1000 == 0
    assert len(made["timeCreated"]) == len("2024-04-25T01:53:50.455Z")
    assert made["softDeletePolicy"] == {
        "retentionDurationSeconds": "604800",
        "effectiveTime": made["softDeletePolicy"]["effectiveTime"],
    }
    locked = datetime.datetime.fromisoformat(made["iamConfiguration"]["uniformBucketLevelAccess"]["lockedTime"])
    assert round((locked - created) / datetime.timedelta(days=1), 3) == 90
    assert made["iamConfiguration"]["bucketPolicyOnly"] == made["iamConfiguration"]["uniformBucketLevelAccess"]


@pytest.mark.parametrize(("location", "kind"), [("EU", "multi-region"), ("nam4", "dual-region")])
def test_a_bucket_of_several_regions_has_a_recovery_point(
    rest: httpx.Client, project: str, location: str, kind: str
) -> None:
    made = insert(rest, project, location=location)
    assert (made["locationType"], made["rpo"]) == (kind, "DEFAULT")
    assert "satisfiesPZI" not in made
    assert "lockedTime" not in made["iamConfiguration"]["uniformBucketLevelAccess"]


def test_an_empty_change_is_none(rest: httpx.Client, project: str) -> None:
    made = insert(rest, project)
    assert rest.patch(f"b/{made['name']}", json={}).json() == made
    changed = rest.patch(f"b/{made['name']}", json={"labels": {"a": "b"}}).json()
    assert (changed["metageneration"], changed["etag"]) == ("2", "CAI=")
    assert changed["softDeletePolicy"] == made["softDeletePolicy"]


def test_autoclass_is_kept_with_the_times_of_its_changes(client: storage.Client) -> None:
    bucket = client.bucket(f"b-{uuid.uuid4().hex}")
    bucket.autoclass_enabled = True
    bucket.create(location="europe-west4")
    assert bucket.autoclass_terminal_storage_class == "NEARLINE"
    toggled, updated = bucket.autoclass_toggle_time, bucket.autoclass_terminal_storage_class_update_time
    assert toggled
    assert updated
    bucket.autoclass_terminal_storage_class = "ARCHIVE"
    bucket.patch()
    bucket.reload()
    assert bucket.autoclass_terminal_storage_class == "ARCHIVE"
    assert bucket.autoclass_toggle_time == toggled
    assert bucket.autoclass_terminal_storage_class_update_time > updated


def test_autoclass_that_was_never_on_is_not_shown(rest: httpx.Client, project: str) -> None:
    assert "autoclass" not in insert(rest, project, autoclass={"enabled": False})


def test_lifecycle_rules_are_kept_and_checked(client: storage.Client, rest: httpx.Client) -> None:
    bucket = client.bucket(f"b-{uuid.uuid4().hex}")
    bucket.add_lifecycle_delete_rule(age=30)
    bucket.add_lifecycle_abort_incomplete_multipart_upload_rule(age=7)
    bucket.create(location="europe-west4")
    bucket.reload()
    assert [(r["action"]["type"], r["condition"]) for r in bucket.lifecycle_rules] == [
        ("Delete", {"age": 30}),
        ("AbortIncompleteMultipartUpload", {"age": 7}),
    ]
    path = f"b/{bucket.name}"
    for action, condition in (("Burn", {"age": 1}), ("Delete", {})):
        rule = {"action": {"type": action}, "condition": condition}
        assert refusal(rest.patch(path, json={"lifecycle": {"rule": [rule]}})) == (400, "invalid")
    bucket.clear_lifecycle_rules()
    bucket.patch()
    assert "lifecycle" not in rest.get(path).json()


def test_objects_of_a_certain_age_are_gone(tmp_path: Path) -> None:
    with RunningSandbox(state=tmp_path / "state") as running, storage_client(running, "a-project") as client:
        bucket = client.bucket("pictures")
        bucket.versioning_enabled = True
        bucket.add_lifecycle_delete_rule(age=30, is_live=True)
        bucket.add_lifecycle_delete_rule(days_since_noncurrent_time=7)
        bucket.add_lifecycle_delete_rule(age=1, matches_prefix=["other/"])
        bucket.create(location="europe-west4")
        bucket.blob("old").upload_from_string(b"old")
        running.advance(29 * 86400)
        bucket.blob("new").upload_from_string(b"new")

        def names(**query: Any) -> list[str]:
            return [blob.name for blob in client.list_blobs(bucket, **query)]

        assert names() == ["new", "old"]
        running.advance(86400)
        assert names() == ["new"]
        assert names(versions=True) == ["new", "old"]
        with pytest.raises(exceptions.NotFound):
            bucket.blob("old").download_as_bytes()
        running.advance(7 * 86400)
        assert names(versions=True) == ["new"]
        assert len(list((running.state / "objects").iterdir())) == 1


def test_a_key_of_the_customer_is_on_the_bucket_and_its_objects(client: storage.Client, rest: httpx.Client) -> None:
    key = "projects/p/locations/europe-west4/keyRings/ring/cryptoKeys/key"
    bucket = client.bucket(f"b-{uuid.uuid4().hex}")
    bucket.default_kms_key_name = key
    bucket.create(location="europe-west4")
    bucket.reload()
    assert bucket.default_kms_key_name == key
    bucket.blob("x").upload_from_string(b"x")
    assert bucket.get_blob("x").kms_key_name == f"{key}/cryptoKeyVersions/1"
    wrong = {"encryption": {"defaultKmsKeyName": "my-key"}}
    assert refusal(rest.patch(f"b/{bucket.name}", json=wrong)) == (400, "invalid")


def test_the_agent_that_encrypts_is_told(client: storage.Client) -> None:
    assert client.get_service_account_email().endswith("@gs-project-accounts.iam.gserviceaccount.com")


@pytest.mark.parametrize(
    "field",
    [
        {"retentionPolicy": {"retentionPeriod": "60"}},
        {"hierarchicalNamespace": {"enabled": True}},
        {"acl": [{"entity": "allUsers", "role": "READER"}]},
    ],
    ids=lambda field: next(iter(field)),
)
def test_settings_without_effect_are_not_pretended(rest: httpx.Client, project: str, field: Any) -> None:
    answer = rest.post("b", params={"project": project}, json={"name": f"b-{uuid.uuid4().hex}", **field})
    assert answer.status_code == 501
    assert f"storage.buckets.insert with {next(iter(field))}" in answer.json()["error"]["message"]


# -------------------------------------------------------------------------------------------- errors


def test_errors_have_reasons_and_no_status(rest: httpx.Client, project: str, bucket: storage.Bucket) -> None:
    query = {"project": project}
    missing = rest.get("b/no-such-bucket")
    assert refusal(missing) == (404, "notFound")
    assert missing.json()["error"]["message"] == "The specified bucket does not exist."
    assert refusal(rest.post("b", json={"name": "my-bucket"})) == (400, "required")
    assert refusal(rest.post("b", params=query, json={"name": "my-google-bucket"})) == (400, "invalid")
    again = rest.post("b", params=query, json={"name": bucket.name})
    assert refusal(again) == (409, "conflict")
    assert "you already own it" in again.json()["error"]["message"]
    taken = rest.post("b", params={"project": "another-project"}, json={"name": bucket.name})
    assert "not available" in taken.json()["error"]["message"]
    stale = rest.patch(f"b/{bucket.name}", params={"ifMetagenerationMatch": 7}, json={"labels": {}})
    assert refusal(stale) == (412, "conditionNotMet")
    bucket.blob("x").upload_from_string(b"")
    assert refusal(rest.delete(f"b/{bucket.name}")) == (409, "conflict")
    assert refusal(rest.get(f"b/{bucket.name}/o/nothing")) == (404, "notFound")


def test_a_bucket_and_an_object_that_are_not_there_are_not_found(bucket: storage.Bucket) -> None:
    with pytest.raises(exceptions.NotFound):
        bucket.blob("nothing").download_as_bytes()
    with pytest.raises(exceptions.NotFound):
        bucket.client.get_bucket("no-such-bucket")
    with pytest.raises(exceptions.BadRequest, match="Invalid bucket name"):
        bucket.client.create_bucket("my-google-bucket")


def test_a_bucket_with_objects_is_not_deleted(bucket: storage.Bucket) -> None:
    bucket.blob("x").upload_from_string(b"")
    with pytest.raises(exceptions.Conflict):
        bucket.delete()


# ------------------------------------------------------------------------------------------- objects


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


def test_replaced_and_deleted_objects_stay_as_generations_in_the_order_of_their_age(bucket: storage.Bucket) -> None:
    for content in (b"one", b"two", b"three"):
        bucket.blob("x").upload_from_string(content)
    bucket.blob("x").delete()
    assert bucket.get_blob("x") is None
    assert list(bucket.client.list_blobs(bucket)) == []
    kept = [b.generation for b in bucket.client.list_blobs(bucket, versions=True)]
    assert [bucket.blob("x", generation=g).download_as_bytes() for g in kept] == [b"one", b"two", b"three"]


def test_folders_are_prefixes(bucket: storage.Bucket) -> None:
    for name in ("a/1", "a/2", "b/1", "top"):
        bucket.blob(name).upload_from_string(b"")
    listing = bucket.client.list_blobs(bucket, delimiter="/")
    assert [b.name for b in listing] == ["top"]
    assert listing.prefixes == {"a/", "b/"}
    assert [b.name for b in bucket.client.list_blobs(bucket, prefix="a/", page_size=1)] == ["a/1", "a/2"]


def test_a_list_can_be_asked_for_some_fields(rest: httpx.Client, bucket: storage.Bucket) -> None:
    for name in ("a", "b"):
        bucket.blob(name).upload_from_string(b"12345")
    path = f"b/{bucket.name}/o"
    answer = rest.get(path, params={"fields": "items(name,size),nextPageToken", "maxResults": 1}).json()
    assert answer == {"items": [{"name": "a", "size": "5"}], "nextPageToken": "1"}
    assert rest.get(path, params={"fields": "items/name"}).json() == {"items": [{"name": "a"}, {"name": "b"}]}
    assert refusal(rest.get(path, params={"fields": "items(name"})) == (400, "invalid")


def test_a_precondition_that_does_not_hold_changes_nothing(bucket: storage.Bucket) -> None:
    bucket.blob("x").upload_from_string(b"one", if_generation_match=0)
    with pytest.raises(exceptions.PreconditionFailed):
        bucket.blob("x").upload_from_string(b"two", if_generation_match=0)
    assert bucket.blob("x").download_as_bytes() == b"one"


def test_objects_survive_a_kill(tmp_path: Path) -> None:
    with RunningSandbox(state=tmp_path / "state") as running, storage_client(running, "a-project") as client:
        client.create_bucket("kept").blob("x").upload_from_string(b"kept")
        running.kill()
        running.start()
        assert client.bucket("kept").blob("x").download_as_bytes() == b"kept"


# ------------------------------------------------------------------------------------------ policies


def test_nobody_makes_a_protected_bucket_public(bucket: storage.Bucket) -> None:
    policy = bucket.get_iam_policy(requested_policy_version=3)
    policy.bindings.append({"role": "roles/storage.objectViewer", "members": {"user:a@example.com"}})
    bucket.set_iam_policy(policy)
    bound = {b["role"]: set(b["members"]) for b in bucket.get_iam_policy().bindings}
    assert bound["roles/storage.objectViewer"] == {"user:a@example.com"}
    assert any("projectOwner:" in member for member in bound["roles/storage.legacyBucketOwner"])
    policy = bucket.get_iam_policy()
    policy.bindings.append({"role": "roles/storage.objectViewer", "members": {"allUsers"}})
    with pytest.raises(exceptions.PreconditionFailed, match="public access prevention"):
        bucket.set_iam_policy(policy)
