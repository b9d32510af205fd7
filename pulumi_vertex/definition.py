"""What a resource is, said once.

A resource's inputs are a `TypedDict` whose keys carry a `Field`; its outputs are the properties of its class. From
these come the keyword arguments that a type checker knows, the package schema, the checks at preview and the diff.
Names are snake_case in Python and camelCase on the wire, as in every Pulumi package; only keys that are named here are
ever translated, so the name of an environment variable stays what it is.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import (
    Annotated,
    Any,
    Final,
    NotRequired,
    Required,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

import pulumi
from pulumi.runtime import rpc

PACKAGE: Final = "vertex"
VERSION: Final = "0.1.0"
UNKNOWN: Final[str] = rpc.UNKNOWN  # stands for a value that a preview does not know yet

Wire = dict[str, Any]  # what JSON can say, plus UNKNOWN
Failures = list[tuple[str, str]]  # property path, what is wrong and how to repair it


class ProblemError(Exception):
    """Something the user can understand and repair: its text is what the user reads."""


@dataclass(frozen=True)
class Field:
    """What is to be known of one input beyond its type.

    `pattern` is a regular expression for the whole text (or for each text of a list, or each key of a map) and `hint`
    says in words what it asks for. `low` and `high` bound numbers, or the number of items.
    """

    doc: str
    pattern: str = ""
    hint: str = ""
    low: int | None = None
    high: int | None = None
    default: Any = None
    replaces: bool = False
    unordered: bool = False
    secret: bool = False


@dataclass(frozen=True)
class Kind:
    """A type of the schema: string, integer, boolean, array, map or an object of named properties."""

    name: str
    item: Kind | None = None
    properties: tuple[Property, ...] = ()
    type_name: str = ""
    doc: str = ""


@dataclass(frozen=True)
class Property:
    python: str
    wire: str
    kind: Kind
    field: Field
    required: bool


@dataclass(frozen=True)
class Definition:
    token: str
    doc: str
    inputs: tuple[Property, ...]
    outputs: tuple[Property, ...] = ()


def camel(name: str) -> str:
    head, *rest = name.split("_")
    return head + "".join(part.capitalize() for part in rest)


def _kind(hint: Any) -> Kind:
    origin = get_origin(hint)
    if origin in (Annotated, Required, NotRequired):
        return _kind(get_args(hint)[0])
    if origin is Union:  # pulumi.Input[T] is T | Awaitable[T] | Output[T]
        return _kind(get_args(hint)[0])
    if origin is pulumi.Output:
        return _kind(get_args(hint)[0])
    if is_typeddict(hint):
        doc = inspect.cleandoc(hint.__doc__ or "")
        return Kind("object", properties=properties_of(hint), type_name=hint.__name__, doc=doc)
    if hint in (str, int, bool):
        return Kind({str: "string", int: "integer", bool: "boolean"}[hint])
    if origin is not None and issubclass(origin, Mapping):
        return Kind("map", item=_kind(get_args(hint)[1]))
    if origin is not None and issubclass(origin, Sequence):
        return Kind("array", item=_kind(get_args(hint)[0]))
    raise TypeError(f"no schema for {hint}")


def _field(hint: Any) -> Field:
    while get_origin(hint) in (Required, NotRequired):
        hint = get_args(hint)[0]
    for extra in get_args(hint)[1:] if get_origin(hint) is Annotated else ():
        if isinstance(extra, Field):
            return extra
    raise TypeError(f"no Field in {hint}")


@cache
def properties_of(inputs: type) -> tuple[Property, ...]:
    """The properties that a TypedDict of inputs names."""
    # pulumi.Input is T | Awaitable[T] | "Output[T]", the last as a text
    hints = get_type_hints(inputs, localns={"Output": pulumi.Output, "T": Any}, include_extras=True)
    required: frozenset[str] = inputs.__required_keys__  # type: ignore[attr-defined]
    return tuple(
        Property(name, camel(name), _kind(hint), _field(hint), name in required) for name, hint in hints.items()
    )


def outputs_of(resource: type) -> tuple[Property, ...]:
    """The outputs of a resource: the properties of its own class."""
    return tuple(
        Property(
            name,
            camel(name),
            _kind(get_type_hints(value.fget)["return"]),
            Field(inspect.cleandoc(value.__doc__ or "")),
            True,
        )
        for name, value in vars(resource).items()
        if isinstance(value, property)
    )


def to_wire(kind: Kind, value: Any) -> Any:
    """A program's value with camelCase names; outputs inside stay what they are, for Pulumi to wait for."""
    if kind.name == "object" and isinstance(value, Mapping):
        names = {p.python: p for p in kind.properties}
        return {
            (names[key].wire if key in names else key): to_wire(names[key].kind, item) if key in names else item
            for key, item in value.items()
            if item is not None
        }
    if kind.name == "map" and kind.item and isinstance(value, Mapping):
        return {key: to_wire(kind.item, item) for key, item in value.items()}
    if kind.name == "array" and kind.item and isinstance(value, Sequence) and not isinstance(value, str):
        return [to_wire(kind.item, item) for item in value]
    return value


class Resource(pulumi.CustomResource):
    """A resource of this package; its subclasses say which."""

    definition: Definition

    def _register(self, name: str, inputs: Mapping[str, Any], opts: pulumi.ResourceOptions | None) -> None:
        properties = to_wire(Kind("object", properties=self.definition.inputs), inputs)
        for output in self.definition.outputs:
            properties.setdefault(output.wire, None)
        pulumi.CustomResource.__init__(self, self.definition.token, name, properties, opts)

    def _output(self, wire: str) -> Any:
        return self.__dict__[wire]


# --- checks -------------------------------------------------------------------------------------------------


def check(definition: Definition, inputs: Wire) -> Failures:
    """Everything that one property alone can be wrong about; all failures at once."""
    failures: Failures = []
    check_properties("", definition.inputs, inputs, failures)
    return failures


def check_properties(path: str, properties: Sequence[Property], value: Wire, failures: Failures) -> None:
    known = {p.wire: p for p in properties}
    for key in value:
        if key not in known and not key.startswith("__"):
            failures.append((_join(path, key), f"is not a property here. Known: {', '.join(sorted(known))}."))
    for prop in properties:
        item = value.get(prop.wire)
        where = _join(path, prop.wire)
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
                failures.append((_join(path, key), f"the name must be {field.hint}."))
            if item is None:
                failures.append((_join(path, key), "has no value. Give it one, or leave the name out."))
            else:
                _check_value(_join(path, key), kind.item, Field(""), item, failures)
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
    elif not isinstance(value, bool):
        failures.append((path, f"must be true or false, not {value!r}."))


def _check_bounds(path: str, field: Field, number: int, what: str, failures: Failures) -> None:
    if field.low is not None and number < field.low:
        failures.append((path, f"must be at least {field.low}{what}, not {number}."))
    if field.high is not None and number > field.high:
        failures.append((path, f"must be at most {field.high}{what}, not {number}."))


def _first_sentence(doc: str) -> str:
    return doc.split(". ")[0].rstrip(".") + "."


def _join(path: str, key: str) -> str:
    plain = re.fullmatch(r"[A-Za-z_][A-Za-z0-9_-]*", key)
    step = key if plain else '["' + key.replace('"', '\\"') + '"]'
    return f"{path}.{step}" if path and plain else f"{path}{step}"


# --- diff ---------------------------------------------------------------------------------------------------


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
        return [found for key in keys for found in _differences(_join(path, key), old.get(key), new.get(key))]
    return [(path, "update")]


# --- schema -------------------------------------------------------------------------------------------------


def schema(resources: Sequence[Definition], settings: Sequence[Property]) -> dict[str, Any]:
    """The package schema, as `pulumi package get-schema` prints it."""
    types: dict[str, Any] = {}

    def type_of(kind: Kind) -> dict[str, Any]:
        if kind.name == "object":
            token = f"{PACKAGE}:index:{kind.type_name}"
            types[token] = {"type": "object", "description": kind.doc, **members(kind.properties)}
            return {"$ref": f"#/types/{token}"}
        if kind.name == "array" and kind.item:
            return {"type": "array", "items": type_of(kind.item)}
        if kind.name == "map" and kind.item:
            return {"type": "object", "additionalProperties": type_of(kind.item)}
        return {"type": kind.name}

    def described(prop: Property) -> dict[str, Any]:
        said = {"description": prop.field.doc, **type_of(prop.kind)}
        if prop.field.default is not None and prop.kind.name in ("string", "integer", "boolean"):
            said["description"] += f" Default: {str(prop.field.default).lower()}."
        if prop.field.replaces:
            said["willReplaceOnChanges"] = True
        if prop.field.secret:
            said["secret"] = True
        return said

    def members(properties: Sequence[Property]) -> dict[str, Any]:
        return {
            "properties": {p.wire: described(p) for p in properties},
            "required": [p.wire for p in properties if p.required],
        }

    configuration = {p.wire: described(p) for p in settings}
    resource_specs = {}
    for definition in resources:
        inputs, all_outputs = members(definition.inputs), members((*definition.inputs, *definition.outputs))
        resource_specs[definition.token] = {
            "description": definition.doc,
            "properties": all_outputs["properties"],
            "required": all_outputs["required"],
            "inputProperties": inputs["properties"],
            "requiredInputs": inputs["required"],
        }
    return {
        "name": PACKAGE,
        "displayName": "Vertex AI model versions and rollouts",
        "version": VERSION,
        "description": "Uploads models to the Vertex AI Model Registry and rolls them out on endpoints.",
        "keywords": ["pulumi", "google cloud", "vertex ai", "kind/native", "category/cloud"],
        "config": {"variables": configuration},
        "provider": {
            "description": "How Vertex AI is reached: project, location and credentials.",
            "inputProperties": configuration,
            "properties": {name: spec for name, spec in configuration.items() if spec["type"] == "string"},
        },
        "types": types,
        "resources": resource_specs,
        "language": {"python": {"respectSchemaVersion": True}},
    }
