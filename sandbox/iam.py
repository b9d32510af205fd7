"""IAM: service accounts, custom roles, and the policies of every resource that has one.

https://cloud.google.com/iam/docs/reference/rest/v1/projects.serviceAccounts
"""

import base64
import random
import re
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

from sandbox import clock
from sandbox.context import Call, Cloud
from sandbox.conventions import cut, update_mask
from sandbox.errors import GoogleError, invalid, not_found, precondition
from sandbox.store import JSON

ACCOUNT_ID = re.compile(r"[a-z](?:[-a-z0-9]{4,28}[a-z0-9])")
MEMBER = re.compile(
    r"(user|serviceAccount|group|domain|principal|principalSet|projectOwner|projectEditor|projectViewer):\S+"
    r"|deleted:(user|serviceAccount|group):\S+\?uid=\d+"
    r"|allUsers|allAuthenticatedUsers"
)
ACCOUNT_EMAIL = re.compile(r"(?P<name>[^@]+)@(?P<project>[^.]+)\.iam\.gserviceaccount\.com")
# Names of Google's service agents, which live in projects of Google's. Agents under @cloudservices, @developer and
# other names have no .iam in their addresses. https://cloud.google.com/iam/docs/service-agents
AGENT = re.compile(r"service-(org-|folder-)?(?P<number>\d+)|bq-\d+")
# Google makes these agents when Service Usage is asked to, or when the API is first used; until then they get no roles.
MADE_ON_DEMAND = {"gcp-sa-aiplatform"}
# Of a policy that was never set: seen in public records of Google's answers.
UNSET_ETAG = "ACAB"

# ------------------------------------------------------------------------------------------ policies


def policy(cloud: Cloud, resource: str, bindings: list[JSON] | None = None) -> JSON:
    """The policy of a resource; `bindings` are its initial ones."""
    held = cloud.store.get("policy", resource)
    if held is None:
        return {"etag": UNSET_ETAG, **({"version": 1, "bindings": bindings} if bindings else {})}
    return {"etag": UNSET_ETAG, **{k: v for k, v in held.items() if v}}


def set_policy(
    cloud: Cloud, resource: str, wanted: JSON, bindings: list[JSON] | None = None, mask: str = "bindings,etag"
) -> JSON:
    """Replaces a resource's policy. `auditConfigs` stay as they are unless `mask` names them.

    Raises ABORTED when the policy changed since it was read, and INVALID_ARGUMENT for a policy that Google refuses.
    """
    held = policy(cloud, resource, bindings)
    if (etag := wanted.get("etag")) and etag != held["etag"]:
        raise GoogleError("ABORTED", "There were concurrent policy changes. Please retry the whole read-modify-write.")
    merged: dict[tuple[str, str], JSON] = {}
    for binding in wanted.get("bindings", []):
        role = binding.get("role", "")
        if not re.fullmatch(r"(roles|(projects|organizations)/[^/]+/roles)/[\w.]+", role):
            raise invalid(f"Role {role or '(empty)'} is not supported for this resource.")
        if role.startswith("projects/") and (cloud.store.get("role", role) or {"deleted": True}).get("deleted"):
            raise invalid(f"Role ({role}) does not exist in the resource's hierarchy.")
        for member in binding.get("members", []):
            _check_member(cloud, member)
        if binding.get("members"):
            entry = merged.setdefault((role, repr(binding.get("condition"))), {**binding, "members": []})
            entry["members"] = sorted({*entry["members"], *binding["members"]})
    saved = {
        "version": 3 if any("condition" in b for b in merged.values()) else 1,  # whatever version was sent
        "etag": _new_etag(),
        "bindings": sorted(merged.values(), key=lambda b: b["role"]),
        "auditConfigs": (wanted if "auditConfigs" in mask else held).get("auditConfigs", []),
    }
    with cloud.store.transaction():
        cloud.store.put("policy", resource, saved)
    return policy(cloud, resource)


def _new_etag() -> str:
    """Google's etags of policies hold the time in microseconds, after a byte 7."""
    return base64.b64encode(b"\x07" + int(clock.time() * 10**6).to_bytes(7)).decode()


def _check_member(cloud: Cloud, member: str) -> None:
    if not MEMBER.fullmatch(member):
        raise invalid(f"Invalid member {member}: it must be prefixed with a type, such as user:.")
    email = member.removeprefix("serviceAccount:")
    account = ACCOUNT_EMAIL.fullmatch(email)
    if account is None:
        return
    agent = None if cloud.projects.knows(account["project"]) else AGENT.fullmatch(account["name"])
    if agent is None:
        known = _is_visible(cloud, email)
    else:  # of agents of projects that it has never met, the sandbox knows nothing
        made_here = account["project"] in MADE_ON_DEMAND and cloud.projects.knows(agent["number"] or "")
        known = not made_here or cloud.store.get("agent", email) is not None
    if not known:
        raise invalid(f"Service account {email} does not exist.")


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
        mask = call.body.get("updateMask") or "bindings,etag"
        return set_policy(call.cloud, call.name, call.body.get("policy", {}), mask=mask)

    async def permissions(call: Call) -> JSON:
        check(call)
        return {"permissions": call.body.get("permissions", [])}  # the sandbox knows one caller, its owner

    return {
        f"{prefix}.getIamPolicy": get_policy,
        f"{prefix}.setIamPolicy": put_policy,
        f"{prefix}.testIamPermissions": permissions,
    }


# ---------------------------------------------------------------------------------- accounts and agents


def check_act_as(cloud: Cloud, account: str | None) -> None:
    """Checks the caller's permission to act as a service account, with the status (400) and words of Vertex AI.

    `--service-account` lists the accounts that exist and may be used; without it, every account may.
    """
    known = cloud.settings.service_accounts
    if account and known and account not in known:
        raise invalid(f"You do not have permission to act as service_account: {account}. (or it may not exist).")


def make_agent(cloud: Cloud, email: str) -> str:
    """Makes a service agent known, so that it can be granted roles. Returns its unique id."""
    agent = cloud.store.get("agent", email) or {"uniqueId": _unique_id()}
    with cloud.store.transaction():
        cloud.store.put("agent", email, agent)
    return str(agent["uniqueId"])


def _unique_id() -> str:
    return f"1{random.randrange(10**20):020}"


_reads: Counter[str] = Counter()


def _is_visible(cloud: Cloud, email: str) -> bool:
    """Whether an account exists and this read sees it.

    With --account-delay, every other read of a new account, the first one included, misses it. Public records show
    such answers of Google's, in no order.
    """
    account = cloud.store.get("account", email)
    if account is None:
        return False
    if clock.time() - account.get("created", 0) >= cloud.settings.account_delay:
        return True
    _reads[email] += 1
    return _reads[email] % 2 == 0


def _find(call: Call) -> JSON:
    """The account that a path names by e-mail or unique id, its project possibly by `-`. Raises NOT_FOUND."""
    wanted = call.name.split("/")[3]
    for email, account in call.cloud.store.list("account"):
        if wanted in (email, account["uniqueId"]):
            return account
    raise not_found("Unknown service account")


def _shown(account: JSON) -> JSON:
    return {k: v for k, v in account.items() if k != "created" and v != ""}


async def create(call: Call) -> JSON:
    project, account_id = call.project, call.body.get("accountId", "")
    if not ACCOUNT_ID.fullmatch(account_id):
        raise invalid(f'Invalid account id "{account_id}": 6 to 30 of a-z, 0-9 and -, a letter first.')
    email = f"{account_id}@{project}.iam.gserviceaccount.com"
    if call.cloud.store.get("account", email):
        raise GoogleError(
            "ALREADY_EXISTS", f"Service account {account_id} already exists within project projects/{project}."
        )
    given, unique = call.body.get("serviceAccount", {}), _unique_id()
    account = {
        "name": f"projects/{project}/serviceAccounts/{email}",
        "projectId": project,
        "uniqueId": unique,
        "email": email,
        "oauth2ClientId": unique,
        "displayName": given.get("displayName", ""),
        "description": given.get("description", ""),
        "etag": _account_etag(),
        "created": clock.time(),
    }
    with call.cloud.store.transaction():
        call.cloud.store.put("account", email, account)
    return _shown(account)


def _account_etag() -> str:
    return base64.b64encode(f"01{random.randrange(10**6):06}".encode()).decode()


async def get(call: Call) -> JSON:
    account = _find(call)
    if not _is_visible(call.cloud, account["email"]):
        raise not_found(f"Service account {account['name']} does not exist.")
    return _shown(account)


async def list_(call: Call) -> JSON:
    found = [_shown(a) for _, a in call.cloud.store.list("account") if a["projectId"] == call.project]
    return cut(call, "accounts", found, usual=20, most=100)


async def patch(call: Call) -> JSON:
    account, given = _find(call), call.body.get("serviceAccount", {})
    paths = [p for p in call.body.get("updateMask", "").split(",") if p]
    for path in paths:
        name = {"display_name": "displayName"}.get(path, path)
        if name not in ("displayName", "description"):
            raise invalid(f"Field {path} of a service account can not be updated.")
        account[name] = given.get(name, "")
    account["etag"] = _account_etag()
    with call.cloud.store.transaction():
        call.cloud.store.put("account", account["email"], account)
    return _shown(account)


async def delete(call: Call) -> JSON:
    """Deletes an account. Policies keep its bindings, under a name that says so."""
    account, store = _find(call), call.cloud.store
    member = f"serviceAccount:{account['email']}"
    deleted = f"deleted:{member}?uid={account['uniqueId']}"
    with store.transaction():
        store.delete("account", account["email"])
        store.delete("policy", account["name"])
        for resource, held in store.list("policy"):
            if any(member in binding["members"] for binding in held["bindings"]):
                for binding in held["bindings"]:
                    binding["members"] = sorted(deleted if m == member else m for m in binding["members"])
                store.put("policy", resource, held)
    return {}


# ---------------------------------------------------------------------------------------- custom roles


def _find_role(call: Call) -> JSON:
    if role := call.cloud.store.get("role", call.name):
        return role
    raise not_found(f"The role named {call.name} was not found.")


def _save_role(call: Call, role: JSON) -> JSON:
    """Stores a role with a new etag, and returns it."""
    role["etag"] = _new_etag()
    with call.cloud.store.transaction():
        call.cloud.store.put("role", role["name"], role)
    return role


async def create_role(call: Call) -> JSON:
    role_id, given = call.body.get("roleId", ""), call.body.get("role", {})
    if not re.fullmatch(r"[a-zA-Z0-9_.]{3,64}", role_id):
        raise invalid(f'The role_id "{role_id}" must be 3 to 64 of a-z, A-Z, 0-9, _ and the full stop.')
    name = f"projects/{call.project}/roles/{role_id}"
    if held := call.cloud.store.get("role", name):
        if held.get("deleted"):
            raise precondition(f"You can't create a role_id ({role_id}) which has been marked for deletion.")
        raise GoogleError("ALREADY_EXISTS", f"A role named {role_id} in projects/{call.project} already exists.")
    return _save_role(call, {"stage": "ALPHA"} | given | {"name": name})


async def get_role(call: Call) -> JSON:
    return _find_role(call)


async def list_roles(call: Call) -> JSON:
    of_project = f"projects/{call.project}/roles/"
    shown = [r for name, r in call.cloud.store.list("role") if name.startswith(of_project)]
    if call.query.get("showDeleted") != "true":
        shown = [r for r in shown if not r.get("deleted")]
    if call.query.get("view") != "FULL":
        shown = [{k: v for k, v in r.items() if k != "includedPermissions"} for r in shown]
    return cut(call, "roles", shown, usual=300, most=1000)


async def patch_role(call: Call) -> JSON:
    role = _find_role(call)
    if (sent := call.body.get("etag")) and sent != role["etag"]:
        raise GoogleError("ABORTED", "There were concurrent role changes. Please retry the whole read-modify-write.")
    changed = update_mask(call.query) if call.query.get("updateMask") else [*call.body]
    changes = {f: call.body[f] for f in changed if f in call.body and f not in ("name", "etag")}
    return _save_role(call, {k: v for k, v in role.items() if k not in changed} | changes | {"name": call.name})


async def delete_role(call: Call) -> JSON:
    """Marks a role as deleted. Google keeps its id for 44 days, during which it can be undeleted and not created."""
    return _save_role(call, _find_role(call) | {"deleted": True})


async def undelete_role(call: Call) -> JSON:
    role = _find_role(call)
    if not role.pop("deleted", False):
        raise precondition(f"The role named {call.name} is not deleted.")
    return _save_role(call, role)


METHODS = {
    "iam.projects.roles.create": create_role,
    "iam.projects.roles.get": get_role,
    "iam.projects.roles.list": list_roles,
    "iam.projects.roles.patch": patch_role,
    "iam.projects.roles.delete": delete_role,
    "iam.projects.roles.undelete": undelete_role,
    "iam.projects.serviceAccounts.create": create,
    "iam.projects.serviceAccounts.get": get,
    "iam.projects.serviceAccounts.list": list_,
    "iam.projects.serviceAccounts.patch": patch,
    "iam.projects.serviceAccounts.delete": delete,
    **policy_methods("iam.projects.serviceAccounts", _find),
}
