"""The checks of a preview: everything that one property alone can be wrong about, as sentences."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final

from .definition import Definition, Field, Kind, Property
from .wire import UNKNOWN, Wire

_DIGEST: Final = re.compile(r"[^@\s]+@sha256:[0-9a-f]{64}")
Failures = list[tuple[str, str]]  # property path, what is wrong and how to repair it


def check(definition: Definition, inputs: Wire) -> Failures:
    """Everything that one property alone can be wrong about; all failures at once."""
    failures: Failures = []
    check_properties("", definition.inputs, inputs, failures)
    return failures


def check_properties(path: str, properties: Sequence[Property], value: Wire, failures: Failures) -> None:
    known = {p.wire: p for p in properties}
    for key in value:
        if key not in known and not key.startswith("__"):
            failures.append((join(path, key), f"is not a property here. Known: {', '.join(sorted(known))}."))
    for prop in properties:
        item = value.get(prop.wire)
        where = join(path, prop.wire)
        if item is None:
            if prop.required:
                failures.append((where, f"is missing. {_first_sentence(prop.field.doc)}"))
        else:
            _check_value(where, prop.kind, prop.field, item, failures)


def _check_value(path: str, kind: Kind, field: Field, value: Any, failures: Failures) -> None:
    if value == UNKNOWN:
        return
    if kind.name == "object":
        if isinstance(value, dict):
            check_properties(path, kind.properties, value, failures)
        else:
            failures.append((path, f"must be an object with {', '.join(p.wire for p in kind.properties)}."))
    elif kind.name == "map" and kind.item:
        if not isinstance(value, dict):
            failures.append((path, "must be a map from names to values."))
            return
        _check_bounds(path, field, len(value), " entries", failures)
        for key, item in value.items():
            if field.pattern and not re.fullmatch(field.pattern, key):
                failures.append((join(path, key), f"the name must be {field.hint}."))
            if item is None:
                failures.append((join(path, key), "has no value. Give it one, or leave the name out."))
            else:
                _check_value(join(path, key), kind.item, Field(""), item, failures)
    elif kind.name == "array" and kind.item:
        if not isinstance(value, list):
            failures.append((path, "must be a list."))
            return
        _check_bounds(path, field, len(value), " items", failures)
        for index, item in enumerate(value):
            _check_value(f"{path}[{index}]", kind.item, Field("", field.pattern, field.hint), item, failures)
    elif kind.name == "string":
        if not isinstance(value, str):
            failures.append((path, f"must be a text, not {value!r}."))
        elif field.pattern and not re.fullmatch(field.pattern, value):
            failures.append((path, f"must be {field.hint}, not {value!r}."))
    elif kind.name == "integer":
        if not isinstance(value, int) or isinstance(value, bool):
            failures.append((path, f"must be a whole number, not {value!r}."))
        else:
            _check_bounds(path, field, value, "", failures)
    elif kind.name == "number":
        if not isinstance(value, int | float) or isinstance(value, bool):
            failures.append((path, f"must be a number, not {value!r}."))
        else:
            _check_bounds(path, field, value, "", failures)
    elif kind.name == "boolean" and not isinstance(value, bool):
        failures.append((path, f"must be true or false, not {value!r}."))


def _check_bounds(path: str, field: Field, number: float, what: str, failures: Failures) -> None:
    if field.low is not None and number < field.low:
        failures.append((path, f"must be at least {field.low}{what}, not {number}."))
    if field.high is not None and number > field.high:
        failures.append((path, f"must be at most {field.high}{what}, not {number}."))


def _first_sentence(doc: str) -> str:
    return doc.split(". ")[0].rstrip(".") + "."


def given_together(path: str, inputs: Wire, first: str, second: str) -> Failures:
    """What is wrong where one of two properties that belong together is missing."""
    if (first in inputs) == (second in inputs):
        return []
    given, missing = (first, second) if first in inputs else (second, first)
    return [(join(path, missing), f"is missing beside {given}. Give both or neither.")]


def by_digest(path: str, image: Any, why: str) -> Failures:
    """What is wrong with an image that is not given by digest; `why` says what a tag would do."""
    if not isinstance(image, str) or image == UNKNOWN or _DIGEST.fullmatch(image):
        return []
    return [
        (
            path,
            f"must be given by digest, NAME@sha256:…, not {image!r}: {why}. Use the digest that the build gives (`ref` "
            "of a docker_build.Image), or ask for it with `gcloud artifacts docker images describe IMAGE:TAG "
            "--format='value(image_summary.digest)'`.",
        )
    ]


def join(path: str, key: str) -> str:
    plain = re.fullmatch(r"[A-Za-z_][A-Za-z0-9_-]*", key)
    step = key if plain else '["' + key.replace('"', '\\"') + '"]'
    return f"{path}.{step}" if path and plain else f"{path}{step}"
