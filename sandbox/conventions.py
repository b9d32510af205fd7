"""Conventions that Google's APIs share: labels, names, etags, update masks, filters, pages and partial answers."""

import datetime
import fnmatch
import hashlib
import operator
import re
from collections.abc import Callable
from typing import Any, Protocol

from sandbox.errors import invalid
from sandbox.filters import Term, holds, parse
from sandbox.store import JSON

# ------------------------------------------------------------------------------------ fields of resources

# A key of Cloud KMS; the group is its location.
KMS_KEY = re.compile(r"projects/[^/]+/locations/([^/]+)/keyRings/[^/]+/cryptoKeys/[^/]+")

# https://cloud.google.com/resource-manager/docs/labels-overview#requirements
_LABEL_KEY = re.compile(r"[^\W\dA-Z_-][\w-]{0,62}")
_LABEL_VALUE = re.compile(r"[\w-]{0,63}")


def check_labels(labels: JSON) -> None:
    """Raises INVALID_ARGUMENT unless `labels` follow Google Cloud's rules."""
    if len(labels) > 64:
        raise invalid(f"At most 64 labels are allowed; there are {len(labels)}.")
    for key, value in labels.items():
        if not _LABEL_KEY.fullmatch(key) or key != key.lower():
            raise invalid(f'Invalid label key "{key}": at most 63 lower-case letters, digits, _ and -, a letter first.')
        if not _LABEL_VALUE.fullmatch(value) or value != value.lower():
            raise invalid(f'Invalid value "{value}" of label "{key}": at most 63 lower-case letters, digits, _ and -.')


def check_display_name(resource: JSON) -> None:
    """Raises INVALID_ARGUMENT unless the resource has a display name of at most 128 characters."""
    name = resource.get("displayName", "")
    if not name:
        raise invalid("Required field display_name is not set.")
    if len(name) > 128:
        raise invalid(f"display_name can be up to 128 characters long; it has {len(name)}.")


def check_encryption(resource: JSON, location: str) -> None:
    """Raises INVALID_ARGUMENT unless a resource's encryption_spec, where it has one, names a key in its region."""
    if key := resource.get("encryptionSpec", {}).get("kmsKeyName"):
        found = KMS_KEY.fullmatch(key)
        if not found or found[1] != location.rpartition("/")[2]:
            raise invalid(f"Invalid encryption_spec.kms_key_name {key}: a key in the region of the resource.")


def etag(resource: JSON, fields: tuple[str, ...]) -> str:
    """Hash of the fields that an update may set, so that a change made by the server causes no conflict."""
    text = repr([(f, sorted(v.items()) if isinstance(v := resource.get(f), dict) else v) for f in fields])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# ------------------------------------------------------------------------------------ requests and answers


class HasQuery(Protocol):
    """A request's query parameters."""

    @property
    def query(self) -> dict[str, str]: ...


def _camel(name: str) -> str:
    return re.sub(r"_([a-z0-9])", lambda m: m[1].upper(), name)


def update_mask(query: dict[str, str]) -> list[str]:
    """The paths of `updateMask`, in camelCase. Raises INVALID_ARGUMENT when there are none."""
    text = query.get("updateMask", query.get("update_mask", ""))
    paths = [_camel(p.strip()) for p in text.split(",") if p.strip()]
    if not paths:
        raise invalid("Required field update_mask is not set.")
    return paths


# Fields that filters may name; each compares as its operators say.
FILTERED = ("displayName",)


def _matches(item: JSON, term: Term, id_field: str, fields: tuple[str, ...]) -> bool:
    labels = item.get("labels", {})
    name, key = (_camel(term.path[0]), ".".join(term.path[1:])) if term.path else ("", "")
    if name == "labels" and not key and term.op == ":":
        return term.value in labels
    if name == "labels" and key:
        if term.op == ":":
            return key in labels and term.value in ("*", labels[key])
        if term.op in ("=", "!="):
            return bool(labels.get(key) == term.value) == (term.op == "=")
    if not key and name in (*fields, _camel(id_field)):
        actual = str(item.get("name" if name == _camel(id_field) else name, ""))
        if name == _camel(id_field):
            actual = actual.rpartition("/")[2]
        if term.op in ("=", "!="):
            return (actual == term.value) == (term.op == "=")
        if term.op == ":" and term.value == "*":
            return bool(actual)
        if term.op == ":" and name == "displayName" and fields != FILTERED:
            return fnmatch.fnmatchcase(actual, term.value)
        if term.op in COMPARED and name.endswith("Time"):
            return bool(actual) and COMPARED[term.op](nanoseconds(actual), nanoseconds(term.value))
    raise invalid(
        f'Invalid filter "{".".join(term.path)}{term.op}{term.value}": the sandbox understands '
        f"{', '.join(fields)}, {id_field} (= and !=), labels.KEY=VALUE, labels.KEY:* and labels:KEY, joined by AND, OR "
        "and NOT."
    )


COMPARED: dict[str, Callable[[Any, Any], bool]] = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge
}  # fmt: skip


def nanoseconds(time: str) -> int:
    """A time as Google's APIs write it, in nanoseconds since 1970. Raises INVALID_ARGUMENT."""
    match = re.fullmatch(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?(Z|[+-]\d\d:\d\d)?", time)
    try:
        whole = datetime.datetime.fromisoformat(match[1] + (match[3] or "Z") if match else "")
    except ValueError:
        raise invalid(f'Invalid time "{time}": it must be in RFC 3339 format.') from None
    return int(whole.timestamp()) * 10**9 + int(((match and match[2]) or "").ljust(9, "0"))


def page(
    call: HasQuery,
    key: str,
    items: list[JSON],
    id_field: str,
    fields: tuple[str, ...] = FILTERED,
    ordered: tuple[str, ...] = ("createTime", "updateTime", "displayName"),
) -> JSON:
    """The answer of a list method: filtered, ordered, and cut to the page that the request names.

    Filters may name `fields`, the resource's id as `id_field`, and labels; orders `ordered`.

    Raises INVALID_ARGUMENT for a filter, an order or a page token that the sandbox does not understand.
    """
    query = call.query
    parts = parse(query.get("filter", ""))
    items = [i for i in items if all(holds(p, i, lambda j, t: _matches(j, t, id_field, fields)) for p in parts)]
    for order in reversed([o for o in query.get("orderBy", "").split(",") if o.strip()]):
        field_name, _, direction = order.strip().partition(" ")
        field_name = _camel(field_name)
        if field_name not in ordered or direction not in ("", "asc", "desc"):
            known = ", ".join(re.sub("[A-Z]", lambda m: "_" + m[0].lower(), name) for name in ordered)
            raise invalid(f'Invalid order_by "{order}": {known}, asc or desc.')
        items = sorted(items, key=lambda i: i.get(field_name, ""), reverse=direction == "desc")
    answer = cut(call, key, items, most=1000)
    if (names := query.get("readMask")) and key in answer:
        tree: JSON = {"name": {}}
        for name in names.split(","):
            node = tree
            for part in name.strip().split("."):
                node = node.setdefault(_camel(part), {})
        answer[key] = [_select(item, tree) for item in answer[key]]
    return answer


def cut(call: HasQuery, key: str, items: list[JSON], *, usual: int = 100, most: int, size: str = "pageSize") -> JSON:
    """The page of `items` that the request names, with the token of the next one.

    `usual` and `most` are the API's default and greatest page size; `size` is the parameter that asks for another.
    Raises INVALID_ARGUMENT for a token or a size that is no number.
    """
    try:
        start, count = int(call.query.get("pageToken") or 0), int(call.query.get(size) or 0)
    except ValueError:
        raise invalid(f"Invalid pageToken or {size}.") from None
    if count < 0 or start < 0:
        raise invalid(f"{size} can not be negative.")
    count = min(count or usual, most)
    answer: JSON = {}
    if shown := items[start : start + count]:
        answer[key] = shown
    if start + count < len(items):
        answer["nextPageToken"] = str(start + count)
    return answer


def partial(answer: Any, fields: str) -> Any:
    """The part of an answer that the query parameter `fields` selects, such as `items(id,owner/name),nextPageToken`.

    https://cloud.google.com/storage/docs/json_api#partial-response
    """
    tokens: list[str] = re.findall(r"[^,/()]+|[,/()]", fields.replace(" ", ""))

    def take(kind: str) -> str:
        if not tokens or (tokens[0] in ",/()") != bool(kind) or not tokens[0].startswith(kind):
            raise invalid(f"Invalid field selection {fields}")
        return tokens.pop(0)

    def read() -> JSON:
        tree: JSON = {}
        while True:
            node = tree.setdefault(take(""), {})
            while tokens and tokens[0] == "/":
                take("/")
                node = node.setdefault(take(""), {})
            if tokens and tokens[0] == "(":
                take("(")
                node.update(read())
                take(")")
            if not tokens or tokens[0] == ")":
                return tree
            take(",")

    tree = read()
    if tokens:
        raise invalid(f"Invalid field selection {fields}")
    return _select(answer, tree)


def _select(value: Any, tree: JSON) -> Any:
    if not tree:
        return value
    if isinstance(value, list):
        return [_select(item, tree) for item in value]
    chosen = {k: (v, tree[k] if k in tree else tree["*"]) for k, v in value.items() if k in tree or "*" in tree}
    return {k: _select(v, part) for k, (v, part) in chosen.items() if not part or isinstance(v, dict | list)}
