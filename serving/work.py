"""One request on its way through the handler. A module of its own: TorchServe accepts one class in a handler's."""

from __future__ import annotations

from dataclasses import dataclass, field

from serving.contract import Limits, Parameters, Request, RequestError
from serving.detector import Count
from serving.pictures import Letterbox, annotate


@dataclass
class Work:
    """A request, what each step made of it, and the milliseconds that took.

    The lists have one entry an instance; an instance that failed has its error there, from the step on where it did.
    error: the request failed as a whole.
    """

    request: Request | None = None
    letterboxes: list[Letterbox | RequestError] = field(default_factory=list)
    counts: list[Count | RequestError] = field(default_factory=list)
    error: RequestError | None = None
    milliseconds: dict[str, float] = field(default_factory=dict)

    @property
    def parameters(self) -> Parameters:
        return self.request.parameters if self.request else Parameters()


def annotate_count(data: bytes | memoryview, count: Count, parameters: Parameters, limits: Limits) -> bytes:
    """The picture as JPEG with what was counted drawn on it."""
    listed = count.people[: parameters.max_people]
    labels = [f"{person.confidence:.2f}" for person in listed]
    return annotate(data, [p.box for p in listed], labels, parameters.region, limits.max_pixels)
