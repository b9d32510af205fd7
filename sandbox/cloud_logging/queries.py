"""entries.list, with the query language of Cloud Logging.

https://cloud.google.com/logging/docs/reference/v2/rest/v2/entries/list
https://cloud.google.com/logging/docs/view/logging-query-language
"""

import contextlib
import re
from typing import Any

from sandbox.cloud_logging.entries import SEVERITIES, severity_of
from sandbox.context import Call
from sandbox.conventions import COMPARED, nanoseconds
from sandbox.errors import invalid
from sandbox.filters import Node, Term, holds, parse
from sandbox.store import JSON

_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,9})?(Z|[+-]\d\d:\d\d)")


def _camel(name: str) -> str:
    return re.sub(r"_([a-z0-9])", lambda m: m[1].upper(), name)


def _values(value: Any, path: tuple[str, ...]) -> list[Any]:
    """What a path leads to. Names of fields may be written either way, keys of maps as they are."""
    if not path:
        return [value]
    if isinstance(value, list):
        return [found for item in value for found in _values(item, path)]
    if not isinstance(value, dict):
        return []
    key = path[0] if path[0] in value else _camel(path[0])
    if key in value:
        return _values(value[key], path[1:])
    return _values(value, (f"{path[0]}.{path[1]}", *path[2:])) if len(path) > 1 else []


def _texts(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for item in value.values() for text in _texts(item)]
    if isinstance(value, list):
        return [text for item in value for text in _texts(item)]
    return [str(value).lower() if isinstance(value, bool) else str(value)]


def matches(entry: JSON, term: Term) -> bool:
    """Whether a log entry satisfies one comparison. Raises INVALID_ARGUMENT for one that can not be made."""
    if not term.path:
        return any(term.value.lower() in text.lower() for text in _texts(entry))
    found = _values(entry, term.path)
    if term.op == ":" and term.value == "*":
        return bool(found)
    if term.op in ("=~", "!~"):
        try:
            pattern = re.compile(term.value)
        except re.error as error:
            raise invalid(f'Invalid regular expression "{term.value}": {error}.') from None
        return any(pattern.search(text) for value in found for text in _texts(value)) == (term.op == "=~")
    if term.op == ":":
        return any(term.value.lower() in text.lower() for value in found for text in _texts(value))
    if term.op in ("=", "!="):
        return any(_equal(term, text) for value in found for text in _texts(value)) == (term.op == "=")
    return any(_ordered(term, value) for value in found)


def _equal(term: Term, text: str) -> bool:
    if term.path[0] == "timestamp":
        return nanoseconds(text) == nanoseconds(term.value)
    if term.path == ("severity",):
        return text == term.value.upper()
    return text == term.value


def _ordered(term: Term, value: Any) -> bool:
    """Numbers compare as numbers, severities by their rank, times as times, and other texts by their letters."""
    compare = COMPARED[term.op]
    if term.path == ("severity",):
        if not (wanted := severity_of(term.value)):
            raise invalid(f'Invalid severity "{term.value}": one of {", ".join(SEVERITIES)}.')
        return compare(SEVERITIES[value], SEVERITIES[wanted])
    if isinstance(value, int | float):
        with contextlib.suppress(ValueError):
            return compare(value, float(term.value))
    if isinstance(value, str):
        return compare(*map(nanoseconds, (value, term.value))) if _TIME.fullmatch(value) else compare(value, term.value)
    return False


def _only_job(parts: tuple[Node | Term, ...]) -> str:
    """The job that a filter asks for, so that other jobs' entries need not be read; "" where it asks for several."""
    jobs = [
        part.value
        for part in parts
        if isinstance(part, Term) and part.path == ("resource", "labels", "job_id") and part.op == "="
    ]
    return jobs[0] if jobs else ""


async def list_entries(call: Call) -> JSON:
    body = call.body
    names = [*body.get("resourceNames", []), *(f"projects/{p}" for p in body.get("projectIds", []))]
    if not names:
        raise invalid("Required field resource_names is not set.")
    order = body.get("orderBy", "timestamp asc")
    if order not in ("timestamp asc", "timestamp desc", "timestamp", ""):
        raise invalid(f'Invalid order_by "{order}": "timestamp asc" or "timestamp desc".')
    try:
        start, size = int(body.get("pageToken") or 0), int(body.get("pageSize") or 50)
    except ValueError:
        raise invalid("Invalid page_token.") from None
    if size < 0:
        raise invalid("page_size can not be negative.")
    parts = parse(body.get("filter", ""))
    projects = {call.cloud.projects.by_id("/".join(name.split("/")[:2])) for name in names}
    found = [
        entry
        for project in sorted(projects)
        for entry in call.cloud.store.logged(project, _only_job(parts))
        if all(holds(part, entry, matches) for part in parts)
    ]
    found.sort(key=lambda entry: (nanoseconds(entry["timestamp"]), entry["insertId"]))
    if order.endswith("desc"):
        found.reverse()
    size = min(size, 1000)
    answer: JSON = {"entries": found[start : start + size]} if found[start:] else {}
    if start + size < len(found):
        answer["nextPageToken"] = str(start + size)
    return answer


METHODS = {"logging.entries.list": list_entries}
