"""Differences between the state of a stack and the world, as findings. Pure: Pulumi's and Google's answers in.

Pulumi compares what a resource was declared with, so that its refresh does not see what others added to a resource:
members of an IAM policy, and models on the endpoint. These are compared here.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

from headcount.google import Place
from headcount.history import ROLLOUT
from headcount.results import printable

LONGEST: Final = 70  # characters of a value in the text
# What a resource is called in the text, keyed by its type; other types are called by the last part of the type.
NAMES: Final = {
    "gcp:artifactregistry/repository:Repository": "repository",
    "gcp:artifactregistry/repositoryIamMember:RepositoryIamMember": "access to the repository",
    "gcp:projects/service:Service": "API",
    "gcp:serviceaccount/account:Account": "service account",
    "gcp:storage/bucket:Bucket": "bucket",
    "gcp:storage/bucketIAMMember:BucketIAMMember": "access to the bucket",
    "gcp:vertex/aiEndpoint:AiEndpoint": "endpoint",
    "gcp:vertex/aiEndpointIamMember:AiEndpointIamMember": "access to the endpoint",
    "vertex:index:ModelVersion": "model version",
    "vertex:index:ReleasedImage": "released image",
    ROLLOUT: "rollout",
}
_GRANTS: Final = {  # the type of a grant on a resource, keyed by the resource's type
    "gcp:artifactregistry/repository:Repository": "gcp:artifactregistry/repositoryIamMember:RepositoryIamMember",
    "gcp:serviceaccount/account:Account": "gcp:serviceaccount/iAMMember:IAMMember",
    "gcp:storage/bucket:Bucket": "gcp:storage/bucketIAMMember:BucketIAMMember",
    "gcp:vertex/aiEndpoint:AiEndpoint": "gcp:vertex/aiEndpointIamMember:AiEndpointIamMember",
}
# Members that every bucket has by itself: https://cloud.google.com/storage/docs/access-control/iam-roles#basic-roles-intrinsic
_OF_EVERY_BUCKET: Final = re.compile(r"project(Owner|Editor|Viewer):.*")
_SECRET: Final = "4dabf18193072939515e22adb298388d"  # pulumi/pulumi, sdk/go/common/resource/sig
Grant = tuple[str, str]  # role, member


@dataclass(frozen=True)
class Change:
    """One property. kind: changed, added or removed in the world. state, world: its values, None where it has none."""

    path: str
    kind: str
    state: Any
    world: Any

    def __str__(self) -> str:
        name = re.sub(r"^models\.([^.]+)\.?", r"release \1: ", self.path).removesuffix(": ")
        if self.kind == "added":
            return f"{name} was added: {_value(self.world)}"
        if self.kind == "removed":
            return f"{name} is gone; it was {_value(self.state)}"
        return f"{name} is {_value(self.world)}; it was {_value(self.state)}"


@dataclass(frozen=True)
class Author:
    """The last change of a resource in the audit log. when: RFC 3339."""

    who: str
    method: str
    when: str


@dataclass(frozen=True)
class Finding:
    """A resource that differs. kind: changed, missing, or foreign (somebody else's, beside the stack's).

    type, name, id: of the resource in the state. repair: the command that repairs it. author: None where not known.
    """

    urn: str
    type: str
    id: str
    kind: str
    changes: tuple[Change, ...]
    repair: str
    author: Author | None = None

    @property
    def name(self) -> str:
        return self.urn.rpartition("::")[2]

    def __str__(self) -> str:
        called = NAMES.get(self.type, self.type.rpartition(":")[2])
        name = self.id if self.type in NAMES else self.name
        return f"{called} {self.name if called == 'rollout' else short(name)}"


def short(id_: str) -> str:
    """The part of a resource's id that tells it from others: without its project and region."""
    return re.sub(r"^projects/[^/]+/(locations/[^/]+/)?", "", id_)


# --- what Pulumi's refresh finds ----------------------------------------------------------------------------


def findings(refreshed: Mapping[str, Any], stack: str) -> list[Finding]:
    """The resources that differ. refreshed: the output of `pulumi refresh --preview-only --json`."""
    repair = f"pulumi up --refresh -s {shlex.quote(stack)}"
    found = []
    for step in refreshed.get("steps") or []:
        before: dict[str, Any] = step.get("oldState") or {}
        after: dict[str, Any] = step.get("newState") or {}
        identity = step["urn"], str(before.get("type", "")), str(before.get("id", ""))
        if step["op"] == "delete":
            found.append(Finding(*identity, "missing", (), repair))
        elif step["op"] == "update":
            changes = tuple(
                _change(path, diff["kind"], before, after)
                for path, diff in sorted((step["detailedDiff"] or {}).items())
            )
            found.append(Finding(*identity, "changed", changes, repair))
    return found


def pending(preview: Mapping[str, Any]) -> list[str]:
    """The steps that the next `pulumi up` would take without any drift, such as "update bucket pictures".

    preview: the output of `pulumi preview --json`.
    """
    quiet = ("same", "refresh", "read")
    steps = [step for step in preview.get("steps") or [] if step["op"] not in quiet]
    return [f"{step['op']} {_type_of(step['urn'])} {step['urn'].rpartition('::')[2]}" for step in steps]


def _type_of(urn: str) -> str:
    type_ = urn.split("::")[2].rpartition("$")[2]
    return NAMES.get(type_, type_.rpartition(":")[2])


_KINDS: Final = {"add": "added", "delete": "removed", "update": "changed"}


def _change(path: str, kind: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> Change:
    def value(state: Mapping[str, Any]) -> Any:
        found = at(state.get("outputs") or {}, path)
        return at(state.get("inputs") or {}, path) if found is None else found

    world = _blinded(at(after.get("outputs") or {}, path))
    state = _blinded(value(before))
    # A provider may call a list changed that the world lost.
    word = _KINDS[kind.removesuffix("-replace")]
    return Change(path, word, None if word == "added" else state, None if word == "removed" else world)


def at(value: Any, path: str) -> Any:
    """The value at a property path of Pulumi's, such as `a.b[0]["c.d"]`; None where there is none."""
    for name, index, quoted in re.findall(r"""([^.\[\]"]+)(?=[.\[]|$)|\[(\d+)\]|\["((?:[^"\\]|\\.)*)"\]""", path):
        if index and isinstance(value, list) and int(index) < len(value):
            value = value[int(index)]
        elif isinstance(value, dict) and (key := name or quoted.replace('\\"', '"')):
            value = value.get(key)
        else:
            return None
    return value


def _blinded(value: Any) -> Any:
    """The value without its secrets, which are objects with a signature where Pulumi has not blinded them."""
    if isinstance(value, list):
        return [_blinded(one) for one in value]
    if isinstance(value, dict):
        return "[secret]" if _SECRET in value else {key: _blinded(one) for key, one in value.items()}
    return value


def _value(value: Any) -> str:
    text = value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)
    text = printable(text)
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


# --- what others added --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Guarded:
    """A resource with an IAM policy. policy: path of its policy; api: of which API. grants: those of the stack."""

    urn: str
    type: str
    id: str
    api: str
    policy: str
    revoke: str
    grants: frozenset[Grant] = frozenset()


def addressed(place: Place, resource: Guarded) -> tuple[str, str]:
    """The HTTP method and the URL that a policy is read with."""
    http, path = resource.policy.split()
    hosts = {"storage": place.base or "https://storage.googleapis.com", "aiplatform": place.vertex}
    return http, f"{hosts.get(resource.api) or place.api(resource.api)}/{path}"


def guarded(state: Mapping[str, Any]) -> list[Guarded]:
    """The resources of a state whose policies are compared. state: a `deployment`."""
    resources: list[dict[str, Any]] = [one for one in state.get("resources") or [] if not one.get("delete")]
    found = []
    for resource in resources:
        if entry := _guarded(resource):
            grants = {
                (str(one["outputs"]["role"]), str(one["outputs"]["member"]))
                for one in resources
                if one["type"] == _GRANTS[resource["type"]] and resource["urn"] in one.get("dependencies", [])
            }
            found.append(replace(entry, grants=frozenset(grants)))
    return found


def _guarded(resource: Mapping[str, Any]) -> Guarded | None:
    type_, id_ = resource["type"], str(resource.get("id", ""))
    identity = resource["urn"], type_, id_
    match NAMES.get(type_):
        case "bucket":
            revoke = f"gcloud storage buckets remove-iam-policy-binding gs://{id_}"
            return Guarded(*identity, "storage", f"GET storage/v1/b/{id_}/iam", revoke)
        case "repository":
            _, project, _, region, _, name = id_.split("/")
            revoke = f"gcloud artifacts repositories remove-iam-policy-binding {name} --location {region}"
            revoke += f" --project {project}"
            return Guarded(*identity, "artifactregistry", f"GET v1/{id_}:getIamPolicy", revoke)
        case "service account":
            email = id_.rpartition("/")[2]
            revoke = f"gcloud iam service-accounts remove-iam-policy-binding {email} --project {id_.split('/')[1]}"
            return Guarded(*identity, "iam", f"POST v1/{id_}:getIamPolicy", revoke)
        case "endpoint":
            # Only v1beta1 has policies of endpoints, and gcloud has no command for them.
            return Guarded(*identity, "aiplatform", f"POST v1beta1/{id_}:getIamPolicy", "")
    return None


def foreign_grants(resource: Guarded, policy: Mapping[str, Any]) -> list[Finding]:
    """The grants of a policy that the stack did not make."""
    held = {
        (str(binding["role"]), str(member))
        for binding in policy.get("bindings") or []
        for member in binding.get("members") or []
    }
    found = []
    for role, member in sorted(held - resource.grants):
        if resource.api == "storage" and _OF_EVERY_BUCKET.fullmatch(member) and ".legacy" in role:
            continue
        repair = f"{resource.revoke} --member {shlex.quote(member)} --role {role}"
        if not resource.revoke:
            repair = f"take {member} out of the policy of {resource.id} with endpoints.setIamPolicy"
        change = Change(f"{role} for {member}", "added", None, "granted")
        found.append(Finding(resource.urn, resource.type, resource.id, "foreign", (change,), repair))
    return found


def endpoints(state: Mapping[str, Any]) -> list[str]:
    """The names of the endpoints that the stack's rollout has."""
    return [str(one["id"]) for one in _rollouts(state)]


def _rollouts(state: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [one for one in state.get("resources") or [] if one["type"] == ROLLOUT and not one.get("delete")]


def foreign_models(state: Mapping[str, Any], endpoint: Mapping[str, Any]) -> list[Finding]:
    """The models on the endpoint that the stack did not deploy. endpoint: as Vertex AI describes it."""
    found = []
    for rollout in _rollouts(state):
        id_, ours = str(rollout["id"]), set((rollout["outputs"].get("deployedModels") or {}).values())
        _, project, _, region, _, number = id_.split("/")
        for model in endpoint.get("deployedModels") or []:
            if model["id"] in ours or model["id"] in (rollout["outputs"].get("otherDeployedModels") or {}):
                continue
            repair = f"gcloud ai endpoints undeploy-model {number} --region {region} --project {project}"
            repair += f" --deployed-model-id {model['id']}"
            change = Change(f"deployed model {model['id']}", "added", None, short(str(model.get("model", ""))))
            found.append(Finding(rollout["urn"], rollout["type"], id_, "foreign", (change,), repair))
    return found


# --- the report ---------------------------------------------------------------------------------------------


def text(found: Sequence[Finding], steps: Sequence[str], stack: str, unknown: str = "") -> str:
    """The report for people. steps: what the next `pulumi up` does anyway. unknown: why no author is known, or ""."""
    return "".join(f"{line}\n" for line in _lines(found, steps, stack, unknown))


def _lines(found: Sequence[Finding], steps: Sequence[str], stack: str, unknown: str) -> Iterator[str]:
    if found:
        many = "resource differs" if len(found) == 1 else "differences"
        yield f"Stack {stack} drifts: {len(found)} {many} between its state and the world."
    else:
        yield f"Stack {stack} does not drift: the world is as its state says."
    for finding in found:
        yield ""
        yield f"{finding}: {'it is missing' if finding.kind == 'missing' else finding.kind}"
        yield from (f"    {change}" for change in finding.changes)
        if finding.author:
            yield f"    last changed by {finding.author.who} at {finding.author.when[:19]}Z, {finding.author.method}"
    if found and unknown:
        yield ""
        yield f"Who changed it is not known: {unknown}"
    if found:
        yield ""
        yield "To repair it:"
        yield from (f"    {repair}" for repair in dict.fromkeys(finding.repair for finding in found))
    if steps:
        yield ""
        yield "The next `pulumi up` would do this anyway, because the program or the stack's file changed:"
        yield from (f"    {step}" for step in steps)


def json_text(found: Sequence[Finding], steps: Sequence[str], stack: str, unknown: str = "") -> str:
    content = {
        "stack": stack,
        "drift": [{"resource": str(one), **asdict(one)} for one in found],
        "authorsUnknown": unknown,
        "pending": list(steps),
    }
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
