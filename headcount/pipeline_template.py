"""Compiled pipelines: reading them, and the values of their parameters. Pure: bytes and texts in, JSON out.

The fields are those of KFP's pipeline_spec.proto:
https://github.com/kubeflow/pipelines/blob/master/api/v2alpha1/pipeline_spec.proto
"""

from __future__ import annotations

import copy
import difflib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

# Vertex AI keeps numbers as doubles, which have all integers up to here.
LARGEST_INTEGER: Final = 2**53
# What KFP fills in itself.
_NOT_GIVEN: Final = ("TASK_FINAL_STATUS", "TASK_CONFIG")


class TemplateError(Exception):
    """A file is not a template, or a parameter does not fit it; the message says how to repair it."""


@dataclass(frozen=True)
class Template:
    """A compiled pipeline. source: what the user named. uri: its address, where it is in a KFP repository."""

    spec: Mapping[str, Any]
    source: str = ""
    uri: str = ""

    @property
    def name(self) -> str:
        return str(self.spec["pipelineInfo"]["name"])

    @property
    def parameters(self) -> dict[str, dict[str, Any]]:
        """The definition of each parameter, as the template has it."""
        found = _inputs(self.spec).get("parameters", {})
        return {name: one for name, one in found.items() if one.get("parameterType") not in _NOT_GIVEN}

    def uncached(self) -> Template:
        """The same pipeline with no task taken from the cache."""
        spec = copy.deepcopy(dict(self.spec))
        for component in (spec["root"], *spec.get("components", {}).values()):
            for task in component.get("dag", {}).get("tasks", {}).values():
                task["cachingOptions"] = {"enableCache": False}
        return Template(spec, self.source, self.uri)


def read(content: bytes, source: str, uri: str = "") -> Template:
    """The template in a file of YAML or JSON. Raises TemplateError."""
    # As kfp reads its own files. YAML 1.2, which other libraries read, takes some of their texts for numbers.
    import yaml

    compiled = "Name the YAML file that kfp's compiler writes."
    if source.endswith(".py"):
        raise TemplateError(f"{source} is a program, not a compiled pipeline. {compiled}")
    try:
        # A second document, of what only Kubernetes has, may follow.
        first = next(iter(yaml.load_all(content, getattr(yaml, "CSafeLoader", yaml.SafeLoader))), None)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        at = f", line {mark.line + 1}" if mark else ""
        raise TemplateError(f"{source} is not YAML{at}, hence no compiled pipeline. {compiled}") from None
    if isinstance(first, dict) and isinstance(first.get("pipelineSpec"), dict):
        first = first["pipelineSpec"]  # the older form, a whole PipelineJob
    if isinstance(first, dict) and "argoproj.io" in str(first.get("apiVersion", "")):
        raise TemplateError(f"{source} is a workflow of Argo, which KFP 1 wrote. Compile the pipeline with KFP 2.")
    missing = _missing(first)
    if missing or not isinstance(first, dict):
        raise TemplateError(f"{source} is not a compiled pipeline: {missing}. {compiled}")
    if not re.match(r"2\.[1-9]", str(first["schemaVersion"])):
        raise TemplateError(
            f"{source} has the schema {first['schemaVersion']}; compile the pipeline with KFP 2, which writes 2.1.0."
        )
    return Template(first, source, uri)


def _missing(found: Any) -> str:
    if not isinstance(found, dict):
        return "it has no fields"
    for path in ("pipelineInfo.name", "root.dag.tasks", "schemaVersion", "components", "deploymentSpec"):
        inner: Any = found
        for name in path.split("."):
            inner = inner.get(name) if isinstance(inner, dict) else None
        if not inner:
            return f"it has no {path}"
    return ""


def _inputs(spec: Mapping[str, Any]) -> Mapping[str, Any]:
    found: Mapping[str, Any] = spec["root"].get("inputDefinitions", {})
    return found


# --- parameters -----------------------------------------------------------------------------------------------


def values(template: Template, given: Sequence[str], preset: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The values of parameters that are written as NAME=VALUE, of the types that the template gives them.

    preset: values of those that are not given. Raises TemplateError for an unknown, missing or repeated name, and for a
    value of another type.
    """
    known = template.parameters
    found: dict[str, Any] = {}
    for one in given:
        name, separator, text = one.partition("=")
        if not separator:
            raise TemplateError(f"--param {one} has no value; write --param NAME=VALUE.")
        if name in found:
            raise TemplateError(f"--param {name} is given twice.")
        if name not in known:
            raise TemplateError(f"{template.name} has no parameter {name}.{_suggestion(name, known)}")
        found[name] = _value(name, text, known[name])
    found = {name: value for name, value in (preset or {}).items() if name in known} | found
    required = [n for n, one in known.items() if "defaultValue" not in one and not one.get("isOptional")]
    if missing := [name for name in required if name not in found]:
        said = " ".join(f"--param {name}={_EXAMPLES.get(_kind(known[name]), '…')}" for name in missing)
        raise TemplateError(f"{template.name} needs {', '.join(missing)}: add {said}.")
    if artifacts := [n for n, one in _inputs(template.spec).get("artifacts", {}).items() if not one.get("isOptional")]:
        raise TemplateError(
            f"{template.name} takes the artifact {artifacts[0]}, which this command cannot give. Import it in the "
            "pipeline by a parameter with its URI (kfp's dsl.importer)."
        )
    return found


def _suggestion(name: str, known: Mapping[str, Any]) -> str:
    if not known:
        return " It has none."
    if near := difflib.get_close_matches(name, known, 1):
        return f" Do you mean {near[0]}?"
    return f" It has: {', '.join(sorted(known))}."


def _kind(definition: Mapping[str, Any]) -> str:
    return str(definition.get("parameterType", "STRING"))


def _value(name: str, text: str, definition: Mapping[str, Any]) -> Any:
    kind = _kind(definition)
    reader, wanted = _READERS.get(kind, (str, "text"))
    try:
        found = reader(text)
    except ValueError:
        raise TemplateError(f"{name} is {text!r}, and has to be {wanted}, such as {name}={_EXAMPLES[kind]}.") from None
    if (allowed := definition.get("literals")) and found not in allowed:
        raise TemplateError(f"{name} is {text!r}, and has to be one of {', '.join(json.dumps(a) for a in allowed)}.")
    return found


def _integer(text: str) -> int:
    found = int(text) if re.fullmatch(r"[+-]?[0-9]+", text) else None
    if found is None or abs(found) > LARGEST_INTEGER:
        raise ValueError
    return found


def _double(text: str) -> float:
    if not math.isfinite(found := float(text)):
        raise ValueError
    return found


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError
    return text.lower() == "true"


def _json(kind: type) -> Callable[[str], Any]:
    def reader(text: str) -> Any:
        if not isinstance(found := json.loads(text), kind):
            raise ValueError
        return found

    return reader


_READERS: Final[Mapping[str, tuple[Callable[[str], Any], str]]] = {
    "NUMBER_INTEGER": (_integer, "an integer of at most 2^53"),
    "NUMBER_DOUBLE": (_double, "a number"),
    "BOOLEAN": (_boolean, "true or false"),
    "LIST": (_json(list), "a list in JSON"),
    "STRUCT": (_json(dict), "an object in JSON"),
}
_EXAMPLES: Final = {
    "NUMBER_INTEGER": "10",
    "NUMBER_DOUBLE": "0.1",
    "BOOLEAN": "true",
    "LIST": "'[1, 2]'",
    "STRUCT": "'{\"a\": 1}'",
}
