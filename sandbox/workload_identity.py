"""Workload Identity Federation: pools of outside identities and their providers. No token is exchanged here.

https://cloud.google.com/iam/docs/reference/rest/v1/projects.locations.workloadIdentityPools
"""

import random
import re
from typing import Any

from sandbox import clock
from sandbox.context import Call
from sandbox.conventions import update_mask
from sandbox.errors import GoogleError, invalid, not_found, precondition
from sandbox.projects import project_number
from sandbox.store import JSON

ID = re.compile(r"(?!gcp-)[a-z0-9-]{4,32}")
KEPT_DELETED = 30 * 86400  # seconds in which a deleted pool or provider can be undeleted, and its id is taken
POOL, PROVIDER = "workload-identity-pool", "workload-identity-provider"
WORDS = {POOL: "WorkloadIdentityPool", PROVIDER: "WorkloadIdentityPoolProvider"}
# Claims and attributes that every provider may map.
# https://cloud.google.com/iam/docs/workload-identity-federation#mapping
MAPPED = re.compile(r"google\.(subject|groups|display_name|profile_photo|posix_username)|attribute\.[a-z0-9_]{1,100}")


def _kind(call: Call) -> str:
    return PROVIDER if ".providers." in call.method.id else POOL


def _find(call: Call) -> JSON:
    held = call.cloud.store.get(_kind(call), call.name)
    if held is None:
        raise not_found(f"Requested entity was not found: {call.name}.")
    return held


def _shown(call: Call, resource: JSON) -> JSON:
    """A resource as Google answers it: its name has the project's number."""
    _, _, rest = resource["name"].removeprefix("projects/").partition("/")
    return {**resource, "name": f"projects/{project_number(call.project)}/{rest}"}


def _operation(call: Call, resource: JSON) -> JSON:
    """An operation that is done when it is next asked for."""
    kind = _kind(call)
    name = f"{resource['name']}/operations/{random.randrange(10**18, 9 * 10**18)}"
    metadata = {"@type": f"type.googleapis.com/google.iam.v1.{WORDS[kind]}OperationMetadata"}
    response = {"@type": f"type.googleapis.com/google.iam.v1.{WORDS[kind]}", **_shown(call, resource)}
    with call.cloud.store.transaction():
        call.cloud.store.put(kind, resource["name"], resource)
        done = {"name": name, "metadata": metadata, "done": True, "response": response}
        call.cloud.store.put("workload-identity-operation", name, done)
    return {"name": name, "metadata": metadata}


def _check(kind: str, resource: JSON) -> None:
    """Raises INVALID_ARGUMENT for a provider that Google refuses."""
    if kind == POOL:
        return
    mapping = resource.get("attributeMapping", {})
    if "google.subject" not in mapping:
        raise invalid("The attribute mapping must map google.subject.")
    if wrong := [name for name in mapping if not MAPPED.fullmatch(name)]:
        raise invalid(f"Invalid attribute mapping: {', '.join(wrong)}.")
    issuer = resource.get("oidc", {}).get("issuerUri", "")
    if not issuer.startswith("https://"):
        raise invalid(f"The issuer {issuer} must be an https URL.")
    # GitHub and others vouch for all their users: such a provider needs a condition about claims.
    # https://cloud.google.com/iam/docs/workload-identity-federation-with-deployment-pipelines#conditions
    if issuer == "https://token.actions.githubusercontent.com" and "assertion." not in resource.get(
        "attributeCondition", ""
    ):
        raise invalid("The attribute condition must reference one of the provider's claims.")


async def create(call: Call) -> JSON:
    kind = _kind(call)
    parameter = f"{WORDS[kind][0].lower()}{WORDS[kind][1:]}Id"
    id_ = call.query.get(parameter, "")
    if not ID.fullmatch(id_):
        raise invalid(f"{parameter} must be 4 to 32 of a-z, 0-9 and -, and not begin with gcp-.")
    if kind == PROVIDER:
        pool = call.cloud.store.get(POOL, call.name.removesuffix("/providers"))
        if pool is None or pool["state"] == "DELETED":
            raise not_found(f"Requested entity was not found: {call.name}.")
    name = f"{call.name}/{id_}"
    if call.cloud.store.get(kind, name):
        raise GoogleError("ALREADY_EXISTS", "Requested entity already exists")
    _check(kind, call.body)
    return _operation(call, {**call.body, "name": name, "state": "ACTIVE"})


async def get(call: Call) -> JSON:
    return _shown(call, _find(call))


async def patch(call: Call) -> JSON:
    resource = dict(_find(call))
    for path in update_mask(call.query):
        name = path.partition(".")[0]
        resource.pop(name, None)
        if call.body.get(name):
            resource[name] = call.body[name]
    _check(_kind(call), resource)
    return _operation(call, resource)


async def delete(call: Call) -> JSON:
    """Marks a pool or provider as deleted. Its id stays taken for 30 days, in which it can be undeleted."""
    resource = _find(call)
    if resource["state"] == "DELETED":
        raise precondition(f"{call.name} is deleted.")
    expires = clock.rfc3339(clock.time() + KEPT_DELETED)
    return _operation(call, {**resource, "state": "DELETED", "expireTime": expires})


async def undelete(call: Call) -> JSON:
    resource = {k: v for k, v in _find(call).items() if k != "expireTime"}
    if resource["state"] != "DELETED":
        raise precondition(f"{call.name} is not deleted.")
    return _operation(call, {**resource, "state": "ACTIVE"})


async def no_rules(call: Call) -> JSON:
    """Attestation rules, which only pools of workloads on Google Cloud have."""
    _find(call)
    return {}


async def get_operation(call: Call) -> JSON:
    operation = call.cloud.store.get("workload-identity-operation", call.name)
    if operation is None:
        raise not_found(f"Operation {call.name} is not found.")
    return operation


_POOLS = "iam.projects.locations.workloadIdentityPools"
METHODS: dict[str, Any] = {
    f"{prefix}.{verb}": method
    for prefix in (_POOLS, f"{_POOLS}.providers")
    for verb, method in (
        ("create", create),
        ("get", get),
        ("patch", patch),
        ("delete", delete),
        ("undelete", undelete),
        ("operations.get", get_operation),
    )
} | {f"{_POOLS}.listAttestationRules": no_rules}
