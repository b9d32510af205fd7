"""Service accounts, and the IAM policies of every resource that has one.

https://cloud.google.com/iam/docs/reference/rest/v1/projects.serviceAccounts
"""

import hashlib
import re
from collections.abc import Awaitable, Callable
from typing import Any

from sandbox.cloud import Call, Cloud, project_number
from sandbox.errors import GoogleError, invalid, not_found
from sandbox.store import JSON

ACCOUNT_ID = re.compile(r"[a-z](?:[-a-z0-9]{4,28}[a-z0-9])")
MEMBER = re.compile(
    r"(user|serviceAccount|group|domain|principal|principalSet|projectOwner|projectEditor|projectViewer):\S+"
    r"|allUsers|allAuthenticatedUsers"
)


# ------------------------------------------------------------------------------------------ policies


def policy(cloud: Cloud, resource: str, bindings: list[JSON] | None = None) -> JSON:
    """The policy of a resource; `bindings` are those it is born with."""
    held = cloud.store.get("policy", resource) or {"version": 1, "bindings": bindings or []}
    text = repr([sorted(b.items(), key=str) for b in held["bindings"]])
    held["etag"] = "BwY" + hashlib.sha256(text.encode()).hexdigest()[:9]  # base64 to clients
    return held


def set_policy(cloud: Cloud, resource: str, wanted: JSON, bindings: list[JSON] | None = None) -> JSON:
    """Raises ABORTED when the policy changed since it was read, INVALID_ARGUMENT for what is no policy."""
    if (etag := wanted.get("etag")) and etag != policy(cloud, resource, bindings)["etag"]:
        raise GoogleError("ABORTED", "There were concurrent policy changes. Please retry the whole read-modify-write.")
    merged: dict[tuple[str, str], JSON] = {}
    for binding in wanted.get("bindings", []):
        role = binding.get("role", "")
        if not re.fullmatch(r"(roles|(projects|organizations)/[^/]+/roles)/[\w.]+", role):
            raise invalid(f"Role {role or '(empty)'} is not supported for this resource.")
        for member in binding.get("members", []):
            _check_member(cloud, member)
        if binding.get("members"):
            entry = merged.setdefault((role, repr(binding.get("condition"))), {**binding, "members": []})
            entry["members"] = sorted({*entry["members"], *binding["members"]})
    saved = {"version": wanted.get("version", 1), "bindings": sorted(merged.values(), key=lambda b: b["role"])}
    with cloud.store.transaction():
        cloud.store.put("policy", resource, saved)
    return policy(cloud, resource)


def _check_member(cloud: Cloud, member: str) -> None:
    if not MEMBER.fullmatch(member):
        raise invalid(f"Invalid member {member}: it must be prefixed with a type, such as user:.")
    email = member.removeprefix("serviceAccount:")
    here = re.fullmatch(r"[^@]+@([^.]+)\.iam\.gserviceaccount\.com", email)
    # Google's own service agents live in projects of Google's.
    if here and not here[1].startswith("gcp-sa-") and not cloud.store.get("account", email):
        raise invalid(f"Service account {email} does not exist.")


# ------------------------------------------------------------------------------------------ accounts


def _find(call: Call) -> JSON:
    """The account that a path names by e-mail or unique id, its project by `-` too. Raises NOT_FOUND."""
    wanted = call.name.split("/")[3]
    for email, account in call.cloud.store.list("account"):
        if wanted in (email, account["uniqueId"]):
            return account
    raise not_found(f"Unknown service account {wanted}.")


async def create(call: Call) -> JSON:
    project, account_id = call.name.split("/")[1], call.body.get("accountId", "")
    if not ACCOUNT_ID.fullmatch(account_id):
        raise invalid(f'Invalid account id "{account_id}": 6 to 30 of a-z, 0-9 and -, a letter first.')
    email = f"{account_id}@{project}.iam.gserviceaccount.com"
    if call.cloud.store.get("account", email):
        raise GoogleError(
            "ALREADY_EXISTS", f"Service account {account_id} already exists within project projects/{project}."
        )
    given = call.body.get("serviceAccount", {})
    account = {
        "name": f"projects/{project}/serviceAccounts/{email}",
        "projectId": project,
        "uniqueId": "1" + project_number(email) + project_number(project)[:8],
        "email": email,
        "oauth2ClientId": "1" + project_number(email) + project_number(project)[:8],
        **{k: given[k] for k in ("displayName", "description") if given.get(k)},
    }
    with call.cloud.store.transaction():
        call.cloud.store.put("account", email, account)
    return _shown(account)


def _shown(account: JSON) -> JSON:
    return {**account, "etag": "MDEw" + hashlib.sha256(repr(account).encode()).hexdigest()[:4]}


async def get(call: Call) -> JSON:
    return _shown(_find(call))


async def list_(call: Call) -> JSON:
    project = call.name.split("/")[1]
    found = [_shown(a) for _, a in call.cloud.store.list("account") if a["projectId"] == project]
    return {"accounts": found} if found else {}


async def patch(call: Call) -> JSON:
    account, given = _find(call), call.body.get("serviceAccount", {})
    paths = [p for p in call.body.get("updateMask", "").split(",") if p]
    for path in paths:
        name = {"display_name": "displayName"}.get(path, path)
        if name not in ("displayName", "description"):
            raise invalid(f"Field {path} of a service account can not be updated.")
        account[name] = given.get(name, "")
    with call.cloud.store.transaction():
        call.cloud.store.put("account", account["email"], account)
    return _shown(account)


async def delete(call: Call) -> JSON:
    account = _find(call)
    with call.cloud.store.transaction():
        call.cloud.store.delete("account", account["email"])
        call.cloud.store.delete("policy", account["name"])
    return {}


def policy_methods(
    prefix: str, check: Callable[[Call], Any] = lambda call: None
) -> dict[str, Callable[[Call], Awaitable[JSON]]]:
    """getIamPolicy, setIamPolicy and testIamPermissions of one kind of resource.

    `check` raises when the resource does not exist.
    """

    async def get_policy(call: Call) -> JSON:
        check(call)
        return policy(call.cloud, call.name)

    async def put_policy(call: Call) -> JSON:
        check(call)
        return set_policy(call.cloud, call.name, call.body.get("policy", {}))

    async def permissions(call: Call) -> JSON:
        check(call)
        return {"permissions": call.body.get("permissions", [])}  # the sandbox knows one caller, its owner

    return {
        f"{prefix}.getIamPolicy": get_policy,
        f"{prefix}.setIamPolicy": put_policy,
        f"{prefix}.testIamPermissions": permissions,
    }


METHODS = {
    "iam.projects.serviceAccounts.create": create,
    "iam.projects.serviceAccounts.get": get,
    "iam.projects.serviceAccounts.list": list_,
    "iam.projects.serviceAccounts.patch": patch,
    "iam.projects.serviceAccounts.delete": delete,
    **policy_methods("iam.projects.serviceAccounts", _find),
}
