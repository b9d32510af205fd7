"""The diff of two sets of inputs, by property."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .checks import join
from .definition import Definition, Property
from .wire import Wire


def with_defaults(properties: Sequence[Property], value: Wire) -> Wire:
    """The value with every default filled in, so that "not given" and "given as the default" are the same."""

    def fill(prop: Property, item: Any) -> Any:
        kind = prop.kind
        if item is None:
            return prop.field.default
        if kind.name == "object" and isinstance(item, dict):
            return with_defaults(kind.properties, item)
        if kind.name == "map" and kind.item and kind.item.name == "object" and isinstance(item, dict):
            return {k: with_defaults(kind.item.properties, v) if isinstance(v, dict) else v for k, v in item.items()}
        if prop.field.unordered and isinstance(item, list):
            return sorted(item, key=str)
        return item

    filled = {p.wire: fill(p, value.get(p.wire)) for p in properties}
    return {key: item for key, item in filled.items() if item not in (None, {}, [])}


def diff(definition: Definition, old: Wire, new: Wire) -> dict[str, str]:
    """Property paths that differ, each with its kind: add, delete or update, with `_replace` where it replaces."""
    old, new = with_defaults(definition.inputs, old), with_defaults(definition.inputs, new)
    found: dict[str, str] = {}
    for prop in definition.inputs:
        suffix = "_replace" if prop.field.replaces else ""
        for path, what in _differences(prop.wire, old.get(prop.wire), new.get(prop.wire)):
            found[path] = what + suffix
    return found


def _differences(path: str, old: Any, new: Any) -> list[tuple[str, str]]:
    if old == new:
        return []
    if old is None:
        return [(path, "add")]
    if new is None:
        return [(path, "delete")]
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        return [found for key in keys for found in _differences(join(path, key), old.get(key), new.get(key))]
    return [(path, "update")]
