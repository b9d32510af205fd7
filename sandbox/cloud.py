"""What every request handler works on: the settings, the state, the running operations and containers."""

import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sandbox.discovery import Method
from sandbox.errors import invalid
from sandbox.store import JSON, Store

if TYPE_CHECKING:
    from starlette.requests import Request

    from sandbox.fleet import Fleet
    from sandbox.operations import Operations
    from sandbox.registry import Registry


@dataclass(frozen=True)
class Settings:
    """The options of `python -m sandbox`; see there."""

    port: int
    state: Path
    fresh: bool = False
    runner: str = "docker"
    admin: bool = False
    validate: bool = False
    hold_after_undeploy: float = 0.0
    operation_seconds: float = 0.0
    service_accounts: tuple[str, ...] = ()
    suppose: frozenset[str] = frozenset()
    idle_seconds: float | None = None
    registry_port: int = 8791
    api_delay: float | None = None


@dataclass(frozen=True)
class Cloud:
    settings: Settings
    store: Store
    operations: "Operations"
    fleet: "Fleet"
    registry: "Registry"


@dataclass(frozen=True)
class Call:
    """One request that means a method Google has.

    `name` is the path's resource, without version and verb:
    `projects/p/locations/l/endpoints/e` for a deploy, `projects/p/locations/l/models` for a list.
    """

    cloud: Cloud
    method: Method
    version: str  # v1 or v1beta1
    name: str
    query: dict[str, str]
    body: JSON
    request: "Request"
    raw: bytes = b""
    # What the admin route ordered for the operation that this call starts.
    fault: JSON = field(default_factory=dict)

    @property
    def location(self) -> str:
        """`projects/p/locations/l`."""
        return "/".join(self.name.split("/")[:4])


# ----------------------------------------------------------------- rules that several resources share

# https://cloud.google.com/resource-manager/docs/labels-overview#requirements
_LABEL_KEY = re.compile(r"[^\W\dA-Z_-][\w-]{0,62}")
_LABEL_VALUE = re.compile(r"[\w-]{0,63}")


def check_labels(labels: JSON) -> None:
    """Raises INVALID_ARGUMENT unless `labels` are labels to Google Cloud."""
    if len(labels) > 64:
        raise invalid(f"At most 64 labels are allowed; there are {len(labels)}.")
    for key, value in labels.items():
        if not _LABEL_KEY.fullmatch(key) or key != key.lower():
            raise invalid(f'Invalid label key "{key}": at most 63 lower-case letters, digits, _ and -, a letter first.')
        if not _LABEL_VALUE.fullmatch(value) or value != value.lower():
            raise invalid(f'Invalid value "{value}" of label "{key}": at most 63 lower-case letters, digits, _ and -.')


def check_display_name(resource: JSON) -> None:
    name = resource.get("displayName", "")
    if not name:
        raise invalid("Required field display_name is not set.")
    if len(name) > 128:
        raise invalid(f"display_name can be up to 128 characters long; it has {len(name)}.")


def check_act_as(cloud: Cloud, account: str | None) -> None:
    """The caller's permission to act as a service account.

    `--service-account` lists the accounts that exist and may be used; without it, every account may.
    The words and the status (400, not 403) are Vertex AI's.
    """
    known = cloud.settings.service_accounts
    if account and known and account not in known:
        raise invalid(f"You do not have permission to act as service_account: {account}. (or it may not exist).")


def etag(resource: JSON, fields: tuple[str, ...]) -> str:
    """Changes with the fields that an update may set: what the server adds by itself is no conflict."""
    text = repr([(f, sorted(v.items()) if isinstance(v := resource.get(f), dict) else v) for f in fields])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def project_number(project: str) -> str:
    """The number that Google names a project by in its answers; here made from the id."""
    if project.isdigit():
        return project
    return str(10**11 + int.from_bytes(hashlib.sha256(project.encode()).digest()[:5]) % (9 * 10**11))


# ------------------------------------------------------------------------------------ lists and masks


def update_mask(query: dict[str, str]) -> list[str]:
    """The paths of `updateMask`, in camelCase. Raises INVALID_ARGUMENT when there are none."""
    text = query.get("updateMask", query.get("update_mask", ""))
    paths = [re.sub(r"_([a-z0-9])", lambda m: m[1].upper(), p.strip()) for p in text.split(",") if p.strip()]
    if not paths:
        raise invalid("Required field update_mask is not set.")
    return paths


_TERM = re.compile(r'\s*(?P<field>[\w.]+|labels\."[^"]+")\s*(?P<op>!=|=|:)\s*(?P<value>"[^"]*"|\S+)\s*')


def _matches(term: "re.Match[str]", item: JSON, id_field: str) -> bool:
    path, op, value = term["field"], term["op"], term["value"].strip('"')
    labels = item.get("labels", {})
    if path == "labels" and op == ":":
        return value in labels
    if path.startswith("labels."):
        key = path.partition(".")[2].strip('"')
        if op == ":":
            return key in labels and value in ("*", labels[key])
        return bool(labels.get(key) == value) == (op == "=")
    known = {"display_name": "displayName", "displayName": "displayName", id_field: "name"}
    if path not in known or op == ":":
        raise invalid(
            f'Invalid filter "{term[0].strip()}": the sandbox understands display_name, {id_field} '
            "(= and !=), labels.KEY=VALUE, labels.KEY:* and labels:KEY, joined by AND."
        )
    actual = item.get(known[path], "")
    if path == id_field:
        actual = actual.rpartition("/")[2]
    return bool(actual == value) == (op == "=")


def page(call: Call, key: str, items: list[JSON], id_field: str) -> JSON:
    """The answer of a list method: filtered, ordered, cut to the page that was asked for.

    Raises INVALID_ARGUMENT for a filter, an order or a page token that is not understood.
    """
    query = call.query
    if text := query.get("filter", "").strip():
        terms = []
        for part in re.split(r"\s+AND\s+", text):
            term = _TERM.fullmatch(part)
            if not term:
                raise invalid(f'Invalid filter "{part}".')
            terms.append(term)
        items = [i for i in items if all(_matches(t, i, id_field) for t in terms)]
    for order in reversed([o for o in query.get("orderBy", "").split(",") if o.strip()]):
        field_name, _, direction = order.strip().partition(" ")
        field_name = re.sub(r"_([a-z])", lambda m: m[1].upper(), field_name)
        if field_name not in ("createTime", "updateTime", "displayName") or direction not in (
            "",
            "asc",
            "desc",
        ):
            raise invalid(f'Invalid order_by "{order}": create_time, update_time or display_name, asc or desc.')
        items = sorted(items, key=lambda i: i.get(field_name, ""), reverse=direction == "desc")
    try:
        start = int(query.get("pageToken") or 0)
        size = int(query.get("pageSize") or 0)
    except ValueError:
        raise invalid("Invalid page_token or page_size.") from None
    if size < 0 or start < 0:
        raise invalid("page_size can not be negative.")
    size = min(size or 100, 1000)
    answer: JSON = {}
    if shown := items[start : start + size]:
        answer[key] = [_masked(i, query) for i in shown]
    if start + size < len(items):
        answer["nextPageToken"] = str(start + size)
    return answer


def _masked(item: JSON, query: dict[str, str]) -> Any:
    if not query.get("readMask"):
        return item
    names = {re.sub(r"_([a-z])", lambda m: m[1].upper(), n) for n in query["readMask"].split(",")}
    return {k: v for k, v in item.items() if k in names or k == "name"}
