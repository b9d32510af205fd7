"""The contract of an exported model as an OpenAPI 3.1 document."""

from __future__ import annotations

import math
from typing import Any

from serving.contract import Limits
from serving.exported.model_contract import Category, Contract, Input, Labels, Number, Picture, Values
from serving.openapi import TEXT, Json, document, errors, object_, ref


def exported_openapi(contract: Contract, route: str) -> Json:
    """The document of a server that has this model and takes requests at this route."""
    examples = [(one.instance, one.prediction) for one in contract.examples]
    request, answer = ({name: [pair[i] for pair in examples]} for i, name in enumerate(("instances", "predictions")))
    predict = {
        "operationId": "predict",
        "summary": f"Predict with the model {contract.name}",
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": ref("Request"), "examples": {"trained": {"value": request}}}},
        },
        "responses": {
            "200": {
                "description": "A prediction for each instance, in order, or an error in its place.",
                "content": {
                    "application/json": {"schema": ref("Predictions"), "examples": {"trained": {"value": answer}}}
                },
            },
            **errors(),
        },
    }
    ignored = {name: {"description": "Not looked at."} for name in contract.ignored}
    names = " ".join(one.name for one in contract.inputs)
    schemas = {
        "Request": object_(
            "instances",
            instances={"type": "array", "minItems": 1, "items": ref("Instance")},
            parameters={"description": "There are none.", "type": ["object", "null"], "maxProperties": 0},
        ),
        "Instance": _object(names.split(), {one.name: _input(one) for one in contract.inputs} | ignored),
        "Prediction": _object(
            [one.name for one in contract.outputs], {one.name: _output(one) for one in contract.outputs}
        ),
        "Predictions": object_(
            "predictions",
            predictions={"type": "array", "items": {"anyOf": [ref("Prediction"), ref("Error")]}},
        ),
    }
    description = (
        f"The model {contract.name}, version {contract.version}. By default at most {Limits.instances} instances and "
        f"{Limits.request_bytes / 1e6:g} MB a request."
    )
    return document(description, route, predict, schemas)


def _object(required: list[str], properties: Json) -> Json:
    return {"type": "object", "required": required, "additionalProperties": False, "properties": properties}


def _input(one: Input) -> Json:
    if isinstance(one, Category):
        return {
            "type": ["string", "null"],
            "examples": list(one.vocabulary[:3]),
            "description": "Any text is taken; one that the model does not know counts as not known, as null does.",
        }
    if isinstance(one, Picture):
        file = object_("b64", b64={"type": "string", "contentEncoding": "base64", "contentMediaType": "image/*"})
        return {"anyOf": [file, *_nested(one.shape, {"type": "integer", "minimum": 0, "maximum": 255})]}
    forms = _nested(one.shape, _number(one))
    return forms[0] if len(forms) == 1 else {"anyOf": forms}


def _number(one: Number) -> Json:
    low, high = one.bounds()
    return {"type": "number" if one.dtype == "float32" else "integer", "minimum": low, "maximum": high}


def _nested(shape: tuple[int, ...], item: Json) -> list[Json]:
    """The forms in which values of a shape may be written: lists in lists, and one list."""
    nested = item
    for size in reversed(shape):
        nested = _list(size, nested)
    return [nested] if len(shape) < 2 else [nested, _list(math.prod(shape), item)]


def _list(size: int, item: Json) -> Json:
    return {"type": "array", "minItems": size, "maxItems": size, "items": item}


def _output(one: Values | Labels) -> Json:
    if isinstance(one, Labels):
        return {"type": "array", "items": TEXT | {"enum": list(one.vocabulary)}, "description": f"Of {one.of}."}
    item: dict[str, Any] = {"type": "number" if one.dtype == "float32" else "integer"}
    return _nested(one.shape, item)[0]
