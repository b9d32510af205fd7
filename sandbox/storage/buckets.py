"""Buckets of Cloud Storage, and their policies.

https://cloud.google.com/storage/docs/json_api/v1/buckets
Our own, because the emulators on PyPI have no policies, no generations, or no maintainer.
"""

import base64
import json
import re
from typing import Any

from starlette.responses import Response

from sandbox import clock
from sandbox.context import Call
from sandbox.conventions import KMS_KEY, check_labels, cut
from sandbox.discovery import read_request
from sandbox.errors import GoogleError, invalid, unimplemented
from sandbox.iam import policy, set_policy
from sandbox.projects import project_number
from sandbox.storage.contents import find_bucket
from sandbox.storage.paths import check_conditions, names
from sandbox.store import JSON

# https://cloud.google.com/storage/docs/buckets#naming
BUCKET = re.compile(r"(?!goog)(?!.*g[o0]{2}gle)[a-z0-9](?:[a-z0-9_.-]{1,220})[a-z0-9]")
DUAL_REGIONS = {"ASIA1", "EUR4", "EUR5", "EUR7", "EUR8", "NAM4"}
# https://cloud.google.com/storage/docs/lifecycle#actions
ACTIONS = ("Delete", "SetStorageClass", "AbortIncompleteMultipartUpload")
UNSUPPORTED = (
    "acl",
    "defaultObjectAcl",
    "defaultEventBasedHold",
    "customPlacementConfig",
    "hierarchicalNamespace",
    "ipFilter",
    "objectRetention",
    "retentionPolicy",
)
# Uniform access can be switched off again for so long.
LOCKED_AFTER = 90 * 86400
PUBLIC = {"allUsers", "allAuthenticatedUsers"}


def find(call: Call, name: str) -> JSON:
    """The bucket as it is stored. Raises NOT_FOUND."""
    return find_bucket(call.cloud.store, name)


def encode_version(number: int) -> str:
    """The etag of a version, as Google writes it: a protocol buffer with the number in its first field."""
    encoded = b"\x08"
    while number > 127:
        encoded, number = encoded + bytes([number & 127 | 128]), number >> 7
    return base64.b64encode(encoded + bytes([number])).decode()


def _resource(bucket: str) -> str:
    return f"projects/_/buckets/{bucket}"


def _born_with(bucket: JSON) -> list[JSON]:
    """The bindings that a new bucket has."""
    project = bucket["projectNumber"]
    owners = [f"projectEditor:{project}", f"projectOwner:{project}"]
    return [
        {"role": "roles/storage.legacyBucketOwner", "members": owners},
        {"role": "roles/storage.legacyBucketReader", "members": [f"projectViewer:{project}"]},
    ]


def _check(call: Call, bucket: JSON) -> None:
    """Raises INVALID_ARGUMENT for settings that Google refuses, and UNIMPLEMENTED for those without effect here."""
    check_labels(bucket.get("labels", {}))
    for name in UNSUPPORTED:
        if bucket.get(name):
            raise unimplemented(f"{call.method.id} with {name}")
    for rule in bucket.get("lifecycle", {}).get("rule", []):
        kind = rule.get("action", {}).get("type")
        if kind not in ACTIONS:
            raise invalid(f"Invalid lifecycle action {kind}: one of {', '.join(ACTIONS)}.")
        if not rule.get("condition"):
            raise invalid("A lifecycle rule needs at least one condition.")
    key = bucket.get("encryption", {}).get("defaultKmsKeyName", "")
    if key and not KMS_KEY.fullmatch(key):
        raise invalid(f"Malformed Cloud KMS crypto key: {key}")


def _completed(bucket: JSON, old: JSON) -> JSON:
    """The bucket with the fields that Google adds. `old` is the bucket before the change, or {}."""
    now = clock.now("milliseconds")
    iam: JSON = bucket.setdefault("iamConfiguration", {})
    uniform: JSON = iam.setdefault("uniformBucketLevelAccess", {"enabled": False})
    if uniform.get("enabled"):
        uniform.setdefault("lockedTime", clock.rfc3339(clock.time() + LOCKED_AFTER, "milliseconds"))
    else:
        uniform.pop("lockedTime", None)
    iam["bucketPolicyOnly"] = dict(uniform)
    iam.setdefault("publicAccessPrevention", "inherited")

    soft: JSON = bucket.setdefault("softDeletePolicy", {})
    soft.setdefault("retentionDurationSeconds", "604800")
    if soft["retentionDurationSeconds"] != old.get("softDeletePolicy", {}).get("retentionDurationSeconds"):
        soft["effectiveTime"] = now

    before = old.get("autoclass", {})
    if (autoclass := bucket.get("autoclass", {})).get("enabled"):
        autoclass.setdefault("terminalStorageClass", "NEARLINE")
        if not before.get("enabled"):
            autoclass["toggleTime"] = now
        if autoclass["terminalStorageClass"] != before.get("terminalStorageClass"):
            autoclass["terminalStorageClassUpdateTime"] = now
    elif not before:
        bucket.pop("autoclass", None)

    for name in ("labels", "lifecycle", "versioning", "cors", "encryption", "logging", "website"):
        if bucket.get(name) in ({}, [], None, {"rule": []}):
            bucket.pop(name, None)
    return bucket


async def insert(call: Call) -> JSON:
    body, project = dict(call.body), call.query.get("project", "")
    name = body.get("name", "")
    if not BUCKET.fullmatch(name) or (len(name) > 63 and "." not in name):
        raise invalid(f"Invalid bucket name: '{name}'")
    if not project:
        raise GoogleError("INVALID_ARGUMENT", "Required parameter: project", reason="required")
    _check(call, body)
    number = project_number(project)
    if taken := call.cloud.store.get("bucket", name):
        message = "Your previous request to create the named bucket succeeded and you already own it."
        if taken["projectNumber"] != number:
            message = (
                "The requested bucket name is not available. The bucket namespace is shared by all users of the "
                "system. Please select a different name and try again."
            )
        raise GoogleError("ALREADY_EXISTS", message)
    now = clock.now("milliseconds")
    location = body.get("location", "US").upper()
    kind = "dual-region" if location in DUAL_REGIONS else "region" if "-" in location else "multi-region"
    bucket = _completed(
        {
            **body,
            "kind": "storage#bucket",
            "id": name,
            "selfLink": f"https://www.googleapis.com/storage/v1/b/{name}",
            "projectNumber": number,
            "generation": str(int(clock.time() * 10**6)),
            "metageneration": "1",
            "location": location,
            "locationType": kind,
            "storageClass": body.get("storageClass", "STANDARD"),
            "timeCreated": now,
            "updated": now,
            "etag": encode_version(1),
            **({"satisfiesPZI": True} if kind == "region" else {"rpo": body.get("rpo", "DEFAULT")}),
        },
        {},
    )
    with call.cloud.store.transaction():
        call.cloud.store.put("bucket", name, bucket)
    return find(call, name)


async def get(call: Call) -> JSON:
    return find(call, names(call)[0])


async def list_(call: Call) -> JSON:
    number, prefix = project_number(call.query.get("project", "")), call.query.get("prefix", "")
    found = [b for _, b in call.cloud.store.list("bucket", prefix) if b["projectNumber"] == number]
    return {"kind": "storage#buckets", **cut(call, "items", found, usual=1000, most=1000, size="maxResults")}


def _merged(old: Any, change: Any) -> Any:
    """JSON merge patch, RFC 7396: null removes."""
    if not isinstance(change, dict):
        return change
    merged = dict(old) if isinstance(old, dict) else {}
    for key, value in change.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = _merged(merged.get(key), value)
    return merged


async def patch(call: Call) -> JSON:
    name = names(call)[0]
    old = find(call, name)
    check_conditions(call, old)
    change = json.loads(call.raw or b"{}")
    read_request(call.method, list(call.query), change)  # raises for a field that a bucket does not have
    change = {k: v for k, v in change.items() if k not in ("name", "id")}
    if not change:
        return old
    bucket = _merged(old, change)
    _check(call, bucket)
    version = int(old["metageneration"]) + 1
    bucket |= {"metageneration": str(version), "updated": clock.now("milliseconds"), "etag": encode_version(version)}
    bucket = _completed(bucket, old)
    with call.cloud.store.transaction():
        call.cloud.store.put("bucket", name, bucket)
    return bucket


async def delete(call: Call) -> Response:
    name = names(call)[0]
    check_conditions(call, find(call, name))
    if call.cloud.store.list("object", f"{name}/"):
        raise GoogleError("ABORTED", "The bucket you tried to delete is not empty.")  # 409 conflict
    with call.cloud.store.transaction():
        call.cloud.store.delete("bucket", name)
        call.cloud.store.delete("policy", _resource(name))
    return Response(status_code=204)


# ------------------------------------------------------------------------------------------ policies


async def get_policy(call: Call) -> JSON:
    name = names(call)[0]
    bucket = find(call, name)
    held = policy(call.cloud, _resource(name), _born_with(bucket))
    return {"kind": "storage#policy", "resourceId": _resource(name), **held}


async def put_policy(call: Call) -> JSON:
    name = names(call)[0]
    bucket = find(call, name)
    members = {m for b in call.body.get("bindings", []) for m in b.get("members", [])}
    if members & PUBLIC and bucket["iamConfiguration"]["publicAccessPrevention"] == "enforced":
        raise GoogleError(
            "FAILED_PRECONDITION",
            "The member bindings allUsers and allAuthenticatedUsers are not allowed since public access prevention "
            "is enforced.",
            http=412,
        )
    held = set_policy(call.cloud, _resource(name), call.body, _born_with(bucket))
    return {"kind": "storage#policy", "resourceId": _resource(name), **held}


async def test_permissions(call: Call) -> JSON:
    find(call, names(call)[0])
    asked = call.request.query_params.getlist("permissions")
    return {"kind": "storage#testIamPermissionsResponse", "permissions": asked}


async def service_agent(call: Call) -> JSON:
    """Storage's agent, which encrypts with keys of the project's and publishes notifications."""
    agent = f"service-{project_number(call.project)}@gs-project-accounts.iam.gserviceaccount.com"
    return {"kind": "storage#serviceAccount", "email_address": agent}


RAW = {"storage.buckets.patch"}
METHODS: dict[str, Any] = {
    "storage.buckets.insert": insert,
    "storage.buckets.get": get,
    "storage.buckets.list": list_,
    "storage.buckets.patch": patch,
    "storage.buckets.delete": delete,
    "storage.buckets.getIamPolicy": get_policy,
    "storage.buckets.setIamPolicy": put_policy,
    "storage.buckets.testIamPermissions": test_permissions,
    "storage.projects.serviceAccount.get": service_agent,
}
