"""Cloud KMS: key rings, keys for encryption, their versions and policies. Nothing is encrypted here.

https://cloud.google.com/kms/docs/reference/rest/v1/projects.locations.keyRings
"""

import re
from typing import Any

from sandbox import clock
from sandbox.context import Call
from sandbox.conventions import check_labels, cut, update_mask
from sandbox.errors import GoogleError, invalid, not_found, precondition, unimplemented
from sandbox.iam import policy_methods
from sandbox.store import JSON

ID = re.compile(r"[a-zA-Z0-9_-]{1,63}")
DAY = 86400
DESTROYED_AFTER = 30 * DAY  # the usual time from the order to the destruction of a version


def _seconds(duration: str) -> float:
    return float(duration.removesuffix("s"))


def _find(call: Call, kind: str, what: str) -> JSON:
    held = call.cloud.store.get(kind, call.name)
    if held is None:
        raise not_found(f"{what} {call.name} not found.")
    return held


def _new_id(call: Call, parameter: str, kind: str, what: str) -> str:
    """The name of a resource that is created. Raises INVALID_ARGUMENT and ALREADY_EXISTS."""
    id_ = call.query.get(parameter, "")
    if not ID.fullmatch(id_):
        raise invalid(f"{parameter} must be 1 to 63 letters, digits, _ and -.")
    name = f"{call.name}/{id_}"
    if call.cloud.store.get(kind, name):
        raise GoogleError("ALREADY_EXISTS", f"{what} {name} already exists.")
    return name


# --------------------------------------------------------------------------------------------- key rings


def _find_ring(call: Call) -> JSON:
    return _find(call, "key-ring", "KeyRing")


async def create_ring(call: Call) -> JSON:
    name = _new_id(call, "keyRingId", "key-ring", "KeyRing")
    ring = {"name": name, "createTime": clock.now()}
    with call.cloud.store.transaction():
        call.cloud.store.put("key-ring", name, ring)
    return ring


async def get_ring(call: Call) -> JSON:
    return _find_ring(call)


async def list_rings(call: Call) -> JSON:
    found = [ring for _, ring in call.cloud.store.list("key-ring", f"{call.name}/")]
    return {**cut(call, "keyRings", found, most=1000), "totalSize": len(found)}


# -------------------------------------------------------------------------------------------------- keys


def _find_key(call: Call) -> JSON:
    return _find(call, "crypto-key", "CryptoKey")


def _check_rotation(key: JSON) -> None:
    if (period := key.get("rotationPeriod")) and _seconds(period) < DAY:
        raise invalid("The rotation period must be at least 24 hours.")


async def create_key(call: Call) -> JSON:
    store, given = call.cloud.store, call.body
    ring = call.name.removesuffix("/cryptoKeys")
    if store.get("key-ring", ring) is None:
        raise not_found(f"KeyRing {ring} not found.")
    name = _new_id(call, "cryptoKeyId", "crypto-key", "CryptoKey")
    if given.get("purpose") != "ENCRYPT_DECRYPT":
        raise unimplemented(f"{call.method.id} with the purpose {given.get('purpose')}")
    check_labels(given.get("labels", {}))
    _check_rotation(given)
    now = clock.now()
    template = {"protectionLevel": "SOFTWARE", "algorithm": "GOOGLE_SYMMETRIC_ENCRYPTION"}
    template |= given.get("versionTemplate", {})
    key: JSON = {"destroyScheduledDuration": f"{DESTROYED_AFTER}s"} | given
    key |= {"name": name, "createTime": now, "versionTemplate": template}
    version: JSON = {
        "name": f"{name}/cryptoKeyVersions/1",
        "state": "ENABLED",
        "createTime": now,
        "generateTime": now,
        **template,
    }
    with store.transaction():
        store.put("crypto-key", name, key)
        if call.query.get("skipInitialVersionCreation") != "true":
            store.put("crypto-key-version", version["name"], version)
    return _shown(call, key)


def _shown(call: Call, key: JSON) -> JSON:
    """A key with its primary version."""
    primary = call.cloud.store.get("crypto-key-version", f"{key['name']}/cryptoKeyVersions/1")
    return {k: v for k, v in key.items() if v != {}} | ({"primary": primary} if primary else {})


async def get_key(call: Call) -> JSON:
    return _shown(call, _find_key(call))


async def patch_key(call: Call) -> JSON:
    key = dict(_find_key(call))
    for path in update_mask(call.query):
        if path.partition(".")[0] in ("name", "purpose", "createTime", "primary"):
            raise invalid(f"{path} cannot be updated.")
        key.pop(path, None)
        if call.body.get(path) is not None:
            key[path] = call.body[path]
    check_labels(key.get("labels", {}))
    _check_rotation(key)
    with call.cloud.store.transaction():
        call.cloud.store.put("crypto-key", call.name, key)
    return _shown(call, key)


# ---------------------------------------------------------------------------------------------- versions


async def list_versions(call: Call) -> JSON:
    found = [version for _, version in call.cloud.store.list("crypto-key-version", f"{call.name}/")]
    return {**cut(call, "cryptoKeyVersions", found, most=1000), "totalSize": len(found)}


async def destroy_version(call: Call) -> JSON:
    """Orders the destruction of a version, which Google carries out after 30 days."""
    version = dict(_find(call, "crypto-key-version", "CryptoKeyVersion"))
    if version["state"] not in ("ENABLED", "DISABLED"):
        raise precondition(f"{version['name']} is not enabled or disabled, its current state is: {version['state']}.")
    version |= {"state": "DESTROY_SCHEDULED", "destroyTime": clock.rfc3339(clock.time() + DESTROYED_AFTER)}
    with call.cloud.store.transaction():
        call.cloud.store.put("crypto-key-version", version["name"], version)
    return version


METHODS: dict[str, Any] = {
    "cloudkms.projects.locations.keyRings.create": create_ring,
    "cloudkms.projects.locations.keyRings.get": get_ring,
    "cloudkms.projects.locations.keyRings.list": list_rings,
    "cloudkms.projects.locations.keyRings.cryptoKeys.create": create_key,
    "cloudkms.projects.locations.keyRings.cryptoKeys.get": get_key,
    "cloudkms.projects.locations.keyRings.cryptoKeys.patch": patch_key,
    "cloudkms.projects.locations.keyRings.cryptoKeys.cryptoKeyVersions.list": list_versions,
    "cloudkms.projects.locations.keyRings.cryptoKeys.cryptoKeyVersions.destroy": destroy_version,
    **policy_methods("cloudkms.projects.locations.keyRings", _find_ring),
    **policy_methods("cloudkms.projects.locations.keyRings.cryptoKeys", _find_key),
}
