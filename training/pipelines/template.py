"""Compiled pipelines: writing them, reading them, and the values of their parameters."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import yaml
from google.protobuf import json_format
from kfp import compiler
from kfp.pipeline_spec import pipeline_spec_pb2 as spec_pb2

from headcount.pipeline_template import Template, TemplateError, values
from training.files import UsageError
from training.pipelines.components import census_pipeline

SCHEMA = "2.1.0"  # of the pipeline specification that KFP 2 writes


def compile_census(training_image: str, serving_image: str, file: Path) -> None:
    """Writes the template of the census pipeline. The same images and sources give the same bytes."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=".compile-") as folder:
        made = Path(folder) / "template.yaml"  # KFP refuses other suffixes
        compiler.Compiler().compile(census_pipeline(training_image, serving_image), str(made))
        load(made)
        made.replace(file)


def load(file: Path) -> Any:
    """Returns the PipelineSpec of a template, in which each field is one that the specification has.

    Raises UsageError.
    """
    try:
        documents = list(yaml.safe_load_all(file.read_text(encoding="utf-8")))
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError):
        raise UsageError(f"{file} is not a compiled pipeline: it is not YAML") from None
    if not documents or not isinstance(documents[0], dict):
        raise UsageError(f"{file} is not a compiled pipeline: it has no object at its top")
    spec = spec_pb2.PipelineSpec()
    try:
        json_format.ParseDict(documents[0], spec)
        deployment = json_format.ParseDict(
            json_format.MessageToDict(spec.deployment_spec), spec_pb2.PipelineDeploymentConfig()
        )
    except json_format.ParseError as error:
        raise UsageError(f"{file} is not a compiled pipeline: {error}") from None
    if spec.schema_version != SCHEMA or not spec.pipeline_info.name or not spec.root.dag.tasks:
        raise UsageError(
            f"{file} is not a compiled pipeline: it must have schemaVersion {SCHEMA}, a name in pipelineInfo, and tasks"
        )
    for component in spec.components.values():
        if component.executor_label and component.executor_label not in deployment.executors:
            raise UsageError(f"{file} is not a compiled pipeline: the executor {component.executor_label} is absent")
    return spec


def images(spec: Any) -> list[str]:
    """Returns the images that the steps of a pipeline run in."""
    executors = json_format.MessageToDict(spec.deployment_spec)["executors"].values()
    return sorted({one["container"]["image"] for one in executors if "container" in one})


def tasks(spec: Any) -> Iterator[str]:
    """Yields the names of the tasks that run a container, those of inner graphs included, each after those it needs."""

    def inside(component: Any) -> Iterator[str]:
        graph = {name: sorted(component.dag.tasks[name].dependent_tasks) for name in sorted(component.dag.tasks)}
        for name in TopologicalSorter(graph).static_order():
            task = component.dag.tasks[name]
            called = spec.components[task.component_ref.name]
            if called.WhichOneof("implementation") == "dag":
                yield from inside(called)
            else:
                yield name

    yield from inside(spec.root)


def arguments(spec: Any, given: Sequence[str]) -> dict[str, Any]:
    """Returns the values of a pipeline's parameters from texts NAME=VALUE, as `headcount pipelines run` reads them.

    Raises UsageError for an unknown, malformed or missing parameter.
    """
    try:
        return values(Template(json_format.MessageToDict(spec)), given)
    except TemplateError as error:
        raise UsageError(str(error)) from None
