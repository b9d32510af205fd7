"""Pipelines whose steps are a line of shell each, and a way to run them."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kfp import compiler, dsl

from training.pipelines import runner, template
from training.pipelines.execution import Execution, Processes
from training.pipelines.report import Report

IMAGE = "tiny"


class Here(Processes):
    """Processes whose image has an identity that the test chooses."""

    code = "1"

    def identity(self, image: str) -> str:
        return self.code


def container(function: Any) -> Any:
    """Makes a container component of a function; kfp's decorator has no types."""
    return dsl.container_component(function)


def component(function: Any) -> Any:
    return dsl.component(function, base_image=IMAGE, install_kfp_package=False)


def shell(script: str, *arguments: Any) -> Any:
    """Returns the container of a component: a script, whose $1 … are the arguments."""
    return dsl.ContainerSpec(image=IMAGE, command=["sh", "-c", script, "step"], args=list(arguments))


def compiled(pipeline: Callable[..., Any], folder: Path) -> Any:
    """Returns the PipelineSpec of a pipeline."""
    file = folder / "pipeline.yaml"
    compiler.Compiler().compile(dsl.pipeline(pipeline), str(file))
    return template.load(file)


class Ran:
    """A run that has ended: whether it succeeded, and what it printed."""

    def __init__(self, spec: Any, root: Path, execution: Execution | None = None, **arguments: Any) -> None:
        out = io.StringIO()
        report = Report(out, 0)
        fresh = arguments.pop("fresh", False)
        self.succeeded = runner.run(spec, arguments, root, execution or Here(), report, fresh=fresh)
        self.text = out.getvalue()

    def __getitem__(self, step: str) -> str:
        """Returns what a run said about a step."""
        (line,) = [line for line in self.text.splitlines() if line.startswith(f"{step}  ")]
        return line.removeprefix(step).strip()
