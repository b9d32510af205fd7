"""Templates that KFP's own compiler makes: one with every type of parameter, and one of two tasks."""

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


@dsl.pipeline(name="Count people")
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


def _compiled(pipeline: Any) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pipeline.yaml"
        compiler.Compiler().compile(pipeline, str(path))
        return path.read_text()


@functools.cache
def template() -> str:
    """The compiled pipeline of every_type, as YAML."""
    return _compiled(every_type)


def spec() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(template())
    return found


@functools.cache
def linear(**env: str) -> str:
    """A compiled pipeline of two tasks, of which the second has environment variables of the stub containers."""

    def linear(text: str = "hello"):  # type: ignore[no-untyped-def]
        first = count(text=text).set_display_name("first")
        second = count(text=f"again {text}").after(first)
        for name, value in env.items():
            second.set_env_variable(name, value)

    return _compiled(dsl.pipeline(name="linear")(linear))
