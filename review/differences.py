"""The properties of a resource that a change touches, before and after."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from pulumi_vertex.wire import UNKNOWN

from .events import HIDDEN, SECRET, Change, State

LATER: Final = "known after the deployment"
_MISSING: Final = object()
Path = tuple[str | int, ...]


@dataclass(frozen=True)
class Difference:
    """One property: its path, and its value before and after as text; None where it is not set.

    replaces: it is the reason why the resource is replaced.
    """

    path: str
    old: str | None
    new: str | None
    replaces: bool = False


def differences(change: Change) -> list[Difference]:
    """The properties that differ, in the order of their names."""
    old, new = change.old or State({}), change.new or State({})
    found: list[Difference] = []
    if change.operation in ("update", "replace"):
        for path, replaces in sorted(change.paths.items()):
            before, after = (_at(state.inputs, path) for state in (old, new))
            # A provider also names properties that it computes, and those that are the same. A changed secret is
            # shown as the same twice.
            leaves = list(_leaves(path, before, after)) or [(path, before, after)] * _has_secret(after)
            found += [Difference(where, _text(a), _text(b), replaces) for where, a, b in leaves]
        if not found:
            found = [Difference(path, _text(a), _text(b)) for path, a, b in _leaves("", old.inputs, new.inputs)]
    elif change.operation in ("create", "delete"):
        found = [Difference(path, _text(a), _text(b)) for path, a, b in _leaves("", old.inputs, new.inputs)]
    if old.protect != new.protect and change.old and change.new:
        found.append(Difference("protect", str(old.protect).lower(), str(new.protect).lower()))
    return found


def parsed(path: str) -> Path:
    """A property path as the engine writes it, in its parts.

    >>> parsed('rules[0].condition["with.dots"]')
    ('rules', 0, 'condition', 'with.dots')
    """
    parts: list[str | int] = []
    for name, index, quoted in re.findall(r'([^.\[\]"]+)|\[(\d+)\]|\["((?:[^"\\]|\\.)*)"\]', path):
        parts.append(int(index) if index else quoted.replace('\\"', '"') if quoted else name)
    # A number in brackets matches the second alternative only; one between dots is a name.
    return tuple(parts)


def _at(value: Any, path: str) -> Any:
    for part in parsed(path):
        try:
            value = value[part]
        except (KeyError, IndexError, TypeError):
            return _MISSING
    return value


def _leaves(path: str, old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    """The innermost properties that differ."""
    if old is _MISSING and isinstance(new, dict):
        old = {}
    if new is _MISSING and isinstance(old, dict):
        new = {}
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            inner = f"{path}.{key}" if path else key
            yield from _leaves(inner, old.get(key, _MISSING), new.get(key, _MISSING))
    elif old is not _MISSING and new is not _MISSING and old == new:
        return
    elif not (old is _MISSING and new is _MISSING):
        yield path, old, new


def _has_secret(value: Any) -> bool:
    return value is not _MISSING and any(word in json.dumps(value) for word in (SECRET, HIDDEN))


def _text(value: Any) -> str | None:
    if value is _MISSING or value is None:
        return None
    if value == UNKNOWN:
        return LATER
    if isinstance(value, str) and value not in (SECRET, HIDDEN):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, sort_keys=True).replace(f'"{UNKNOWN}"', LATER)
