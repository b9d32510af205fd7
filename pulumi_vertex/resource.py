"""What a resource of this provider is: a class for programs, and a type that the gRPC service drives.

A new resource is one new file (or folder) with both, and one line in `provider.RESOURCES`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pulumi

from . import checks, differences
from .checks import Failures
from .definition import Definition, Kind, to_wire
from .engine_call import EngineCall
from .vertex_api import VertexApi
from .wire import Wire


@dataclass(frozen=True)
class State:
    """What Pulumi keeps of a resource, secrets unwrapped. `outputs` are those that the inputs do not say already."""

    id: str
    inputs: Wire
    outputs: Wire


class ResourceType(ABC):
    """One kind of resource, from the check of its inputs to its deletion.

    What fails raises ProblemError, with a text for users; HalfMadeError where the resource exists now, but not as
    wanted. The defaults of `check` and `diff` follow from the definition.
    """

    definition: ClassVar[Definition]
    seconds: ClassVar[Mapping[str, float]]  # default timeouts of create, read, update and delete

    def resolve(self, inputs: Wire) -> Wire:
        """The inputs that Pulumi keeps: with the content of a file, for example, in place of its path."""
        return inputs

    def check(self, inputs: Wire) -> Failures:
        """Everything that is wrong with the inputs, in a preview too, when some are UNKNOWN."""
        return checks.check(self.definition, inputs) + self.check_together(inputs)

    def check_together(self, inputs: Wire) -> Failures:
        """What several properties together, or more than a pattern, can be wrong about."""
        return []

    def diff(self, state: State, inputs: Wire) -> dict[str, str]:
        """Property paths that differ, each with its kind: add, delete or update, with `_replace` where it replaces."""
        return differences.diff(self.definition, state.inputs, inputs)

    def warnings(self, state: State, inputs: Wire) -> list[str]:
        """Lines that a preview, and an update, say of a change beyond its diff."""
        return []

    @abstractmethod
    def preview(self, call: EngineCall, api: VertexApi, inputs: Wire, state: State | None) -> Wire:
        """The outputs after a create (no `state`) or an update, UNKNOWN where only Vertex AI can tell."""

    @abstractmethod
    def create(self, call: EngineCall, api: VertexApi, inputs: Wire) -> State: ...

    @abstractmethod
    def read(self, call: EngineCall, api: VertexApi, state: State) -> State | None:
        """What is there now, None if it is gone. Without inputs in `state` it is an import."""

    @abstractmethod
    def update(self, call: EngineCall, api: VertexApi, state: State, inputs: Wire) -> Wire:
        """Brings the resource to the inputs, and returns its outputs."""

    @abstractmethod
    def delete(self, call: EngineCall, api: VertexApi, state: State) -> None:
        """Deletes the resource. That it is gone already is no error."""


class Resource(pulumi.CustomResource):
    """A resource as programs see it; its subclasses say which."""

    definition: Definition

    def _register(self, name: str, inputs: Mapping[str, Any], opts: pulumi.ResourceOptions | None) -> None:
        properties = to_wire(Kind("object", properties=self.definition.inputs), inputs)
        for output in self.definition.outputs:
            properties.setdefault(output.wire, None)
        pulumi.CustomResource.__init__(self, self.definition.token, name, properties, opts)

    def _output(self, wire: str) -> Any:
        return self.__dict__[wire]
