"""The template of a pipeline, as `kfp` compiles it: read, recognised, and compared with the values of its parameters.

https://github.com/kubeflow/pipelines/blob/master/api/v2alpha1/pipeline_spec.proto
"""

from __future__ import annotations

import contextlib
import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import yaml

from ..checks import Failures, join
from ..errors import ProblemError
from ..wire import UNKNOWN, Wire

COMPILE: Final = "Compile a pipeline with KFP 2: kfp dsl compile --py FILE --output TEMPLATE"
NEEDED: Final = ("pipelineInfo", "root", "schemaVersion")
OLDEST: Final = (2, 1)  # schema version: KFP 2 writes 2.1.0, and KFP 1.8 wrote 2.0.0
# ParameterType of the specification: the types of values, and words for them. A bool is an int to Python.
TYPES: Final[Mapping[str, tuple[tuple[type, ...], str]]] = {
    "STRING": ((str,), "a text"),
    "NUMBER_INTEGER": ((int,), "a whole number"),
    "NUMBER_DOUBLE": ((int, float), "a number"),
    "BOOLEAN": ((bool,), "true or false"),
    "LIST": ((list,), "a list"),
    "STRUCT": ((dict,), "a map"),
}


def content(template: str) -> str:
    """The content of a template that is given by its path, or by its content. Raises ProblemError."""
    if "\n" in template or template.lstrip().startswith("{"):
        return template
    try:
        return Path(template).expanduser().read_text()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is no text"
        raise ProblemError(
            f"must be the content of a compiled pipeline or the path of a file with it, and {template!r} cannot be "
            f"read: {why}. {COMPILE}."
        ) from None


def parsed(text: str) -> Wire:
    """The PipelineSpec that a template has. Raises ProblemError."""
    try:
        documents = [document for document in _documents(text) if document is not None]
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", see its line {mark.line + 1}" if mark else ""
        raise ProblemError(f"is no compiled pipeline: it is not YAML{where}. {COMPILE}.") from None
    spec, *platforms = documents or [None]
    if not isinstance(spec, dict) or "pipelineSpec" in spec:
        raise ProblemError(f"is no pipeline that KFP 2 has compiled. {COMPILE}.")
    if missing := [name for name in NEEDED if name not in spec]:
        raise ProblemError(f"is no compiled pipeline: it has no {' and no '.join(missing)}. {COMPILE}.")
    if _version(spec["schemaVersion"]) < OLDEST:
        raise ProblemError(f"has the old schema {spec['schemaVersion']}. {COMPILE}.")
    if not isinstance(spec["root"], dict) or not name_of(spec):
        raise ProblemError(f"is no compiled pipeline: its root is no map, or it has no name. {COMPILE}.")
    if any(isinstance(one, dict) and one.get("platforms") for one in platforms):
        raise ProblemError(
            "has settings for Kubernetes, which Vertex AI has no place for. Leave out kfp-kubernetes in the pipeline, "
            "and compile it again."
        )
    found: Wire = whole(spec)
    return found


def _documents(text: str) -> list[Any]:
    """The documents of a text in YAML. JSON is YAML, too, and this provider keeps templates as JSON."""
    if text.lstrip().startswith("{"):
        with contextlib.suppress(ValueError):
            return [json.loads(text)]
    # PyYAML in Python takes a second for 200 KB, which templates of some hundred tasks have; libyaml is not everywhere.
    return list(yaml.load_all(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader)))


def canonical(spec: Wire) -> str:
    """A PipelineSpec as JSON, the same text for the same pipeline, whatever its comments and order."""
    return json.dumps(whole(spec), sort_keys=True, ensure_ascii=False)


def name_of(spec: Wire) -> str:
    info = spec.get("pipelineInfo")
    return str(info.get("name") or "") if isinstance(info, dict) else ""


def check_values(spec: Wire, inputs: Wire) -> Failures:
    """What is wrong with the parameters and artifacts that the inputs give to a pipeline."""
    defined = _map(spec["root"].get("inputDefinitions"))
    failures = _check_names("parameters", _map(defined.get("parameters")), inputs.get("parameters", {}))
    failures += _check_names("inputArtifacts", _map(defined.get("artifacts")), inputs.get("inputArtifacts", {}))
    values = inputs.get("parameters")
    for name, value in (values if isinstance(values, dict) else {}).items():
        parameter = _map(_map(defined.get("parameters")).get(name))
        if value not in (UNKNOWN, None) and (said := _wrong_type(parameter, value)):
            failures.append((join("parameters", name), said))
    return failures


def with_caching(spec: Wire, enable: bool) -> Wire:
    """The PipelineSpec with caching switched on or off for all tasks, as google-cloud-aiplatform does it."""
    changed: Wire = json.loads(json.dumps(spec))
    for component in [changed["root"], *_map(changed.get("components")).values()]:
        for task in _map(_map(component.get("dag")).get("tasks")).values():
            task["cachingOptions"] = {"enableCache": enable}
    return changed


def task_count(spec: Wire) -> int:
    """The tasks at the top of a pipeline."""
    return len(_map(_map(_map(spec.get("root")).get("dag")).get("tasks")))


def _check_names(where: str, defined: Wire, given: Any) -> Failures:
    if not isinstance(given, dict):
        return []
    failures: Failures = []
    what = "parameter" if where == "parameters" else "input artifact"
    for name in given:
        if name not in defined:
            near = difflib.get_close_matches(name, defined, 1)
            there = f"It has {', '.join(sorted(defined))}." if defined else f"It has no {what}s."
            hint = f"Did you mean {near[0]}?" if near else there
            failures.append((join(where, name), f"is no {what} of the pipeline. {hint}"))
    for name, one in defined.items():
        needed = isinstance(one, dict) and "defaultValue" not in one and not one.get("isOptional")
        if needed and given.get(name) is None:
            failures.append((join(where, name), f"is missing: the pipeline has no default for this {what}."))
    return failures


def _wrong_type(parameter: Wire, value: Any) -> str:
    """What is wrong with the type of a parameter's value, or ""."""
    kind = parameter.get("parameterType", "")
    types, words = TYPES.get(kind, ((object,), ""))
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types and object not in types):
        return f"must be {words}, not {value!r}: the pipeline declares it as {kind}."
    literals = parameter.get("literals")
    if isinstance(literals, list) and literals and value not in literals:
        return f"must be one of {', '.join(map(repr, literals))}, not {value!r}."
    return ""


def _version(text: Any) -> tuple[int, ...]:
    parts = str(text).split(".")
    return tuple(int(part) if part.isdigit() else 0 for part in parts[:2])


def _map(value: Any) -> Wire:
    return value if isinstance(value, dict) else {}


def whole(value: Any) -> Any:
    """A value as JSON has it: whole numbers as int, dates as texts."""
    if isinstance(value, dict):
        return {str(key): whole(item) for key, item in value.items()}
    if isinstance(value, list):
        return [whole(item) for item in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, str | int | float | None) else str(value)
