"""A template that KFP's own compiler makes, with every type of parameter."""

# No `from __future__ import annotations` here: KFP reads the annotations themselves.

import functools
import tempfile
from pathlib import Path
from typing import Any, Optional

import yaml
from kfp import compiler, dsl


@dsl.container_component
def count(text: str, counted: dsl.OutputPath(int)):  # type: ignore[no-untyped-def, valid-type]
    return dsl.ContainerSpec(image="busybox", command=["sh", "-c"], args=[f'mkdir -p "$(dirname {counted})"', text])


@dsl.pipeline(name="Count people", description="Every type of parameter, one of them required.")
def every_type(
    folder: str,
    epochs: int = 3,
    rate: float = 0.1,
    shuffle: bool = True,
    sizes: list[int] = [1, 2],  # noqa: B006
    options: dict[str, str] = {},  # noqa: B006
    note: Optional[str] = None,  # noqa: UP045  KFP knows this form only
) -> None:
    first = count(text=folder)
    count(text="again").after(first)


@functools.cache
def template() -> str:
    """The compiled pipeline of every_type, as YAML."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pipeline.yaml"
        compiler.Compiler().compile(every_type, str(path))
        return path.read_text()


def spec() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(template())
    return found
