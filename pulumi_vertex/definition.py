"""How a resource is defined, once.

A resource's inputs are a `TypedDict` whose keys carry a `Field`; its outputs are the properties of its class. From
these come the keyword arguments that a type checker knows, the package schema (package_schema.py), the checks of a
preview (checks.py) and the diff (differences.py). Names are snake_case in Python and camelCase on the wire, as in every
Pulumi package. Only names that are defined here are translated, so that the name of an environment variable stays what
it is.
"""

from __future__ import annotations

import inspect
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

PACKAGE: Final = "vertex"
VERSION: Final = "0.1.0"


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
    """A type of the schema: string, integer, number, boolean, array, map, an object of named properties, or any."""

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


_SIMPLE: Final = {str: "string", int: "integer", float: "number", bool: "boolean"}


def camel(name: str) -> str:
    head, *rest = name.split("_")
    return head + "".join(part.capitalize() for part in rest)


def _kind(hint: Any) -> Kind:
    origin = get_origin(hint)
    if hint is Any:
        return Kind("any")
    if origin in (Annotated, Required, NotRequired):
        return _kind(get_args(hint)[0])
    if origin is Union:  # pulumi.Input[T] is T | Awaitable[T] | Output[T]
        return _kind(get_args(hint)[0])
    if origin is pulumi.Output:
        return _kind(get_args(hint)[0])
    if is_typeddict(hint):
        doc = inspect.cleandoc(hint.__doc__ or "")
        return Kind("object", properties=properties_of(hint), type_name=hint.__name__, doc=doc)
    if hint in _SIMPLE:
        return Kind(_SIMPLE[hint])
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
    """The outputs of a resource: the properties of its class, and of those between it and Pulumi's."""
    classes = [kind for kind in reversed(resource.__mro__) if kind not in pulumi.CustomResource.__mro__]
    return tuple(
        Property(
            name,
            camel(name),
            _kind(get_type_hints(value.fget)["return"]),
            Field(inspect.cleandoc(value.__doc__ or "")),
            True,
        )
        for kind in classes
        for name, value in vars(kind).items()
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
