"""Values as they travel between the engine and this provider: JSON in a protobuf Struct, with camelCase names.

The engine wraps secrets, and in a preview it sends UNKNOWN for what is not known yet.
https://www.pulumi.com/docs/iac/extending-pulumi/provider-implementers-guide/
"""

from __future__ import annotations

from typing import Any, Final

from google.protobuf import json_format, struct_pb2
from pulumi.runtime import rpc

UNKNOWN: Final[str] = rpc.UNKNOWN  # stands for a value that a preview does not know yet

Wire = dict[str, Any]  # what JSON can express, plus UNKNOWN


class Secret(str):
    """A text that an error message does not quote."""

    def __repr__(self) -> str:
        return "[secret]"


def unwrapped(value: Any) -> Any:
    """A value without its secret wrappings; whole numbers as int, which JSON over protobuf gives as float."""
    if isinstance(value, dict):
        if rpc.is_rpc_secret(value):
            inner = unwrapped(value.get("value"))
            return Secret(inner) if isinstance(inner, str) and inner != UNKNOWN else inner
        return {key: unwrapped(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [unwrapped(item) for item in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def has_secret(value: Any) -> bool:
    if isinstance(value, dict):
        return rpc.is_rpc_secret(value) or any(map(has_secret, value.values()))
    return isinstance(value, list) and any(map(has_secret, value))


def wrapped_like(value: Any, model: Any) -> Any:
    """`value` with every part wrapped as a secret that is one in `model`; a list with a secret in it is one wholly."""
    if rpc.is_rpc_secret(model) or (isinstance(model, list) and has_secret(model)):
        return rpc.wrap_rpc_secret(value)
    if isinstance(value, dict) and isinstance(model, dict):
        return {key: wrapped_like(item, model.get(key)) for key, item in value.items()}
    return value


def from_struct(struct: struct_pb2.Struct) -> Wire:
    value: Wire = json_format.MessageToDict(struct)
    return value


def to_struct(value: Wire) -> struct_pb2.Struct:
    struct = struct_pb2.Struct()
    struct.update(value)
    return struct
