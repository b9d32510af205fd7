"""The package schema, from which Pulumi generates programs' code in other languages.

https://www.pulumi.com/docs/iac/guides/building-extending/packages/schema/
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .definition import PACKAGE, VERSION, Definition, Kind, Property


def package_schema(resources: Sequence[Definition], settings: Sequence[Property]) -> dict[str, Any]:
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
        if kind.name == "any":
            return {"$ref": "pulumi.json#/Any"}
        return {"type": kind.name}

    def described(prop: Property) -> dict[str, Any]:
        said = {"description": prop.field.doc, **type_of(prop.kind)}
        if prop.field.default is not None and prop.kind.name in ("string", "integer", "boolean"):
            default = prop.field.default
            said["description"] += f" Default: {str(default).lower() if isinstance(default, bool) else default}."
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
        "displayName": "Vertex AI jobs, pipelines, model versions and rollouts",
        "version": VERSION,
        "description": "Runs jobs and pipelines on Vertex AI, uploads models and rolls them out on endpoints.",
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
