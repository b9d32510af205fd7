"""A request to count people. A module of its own, because TorchServe accepts one class in a handler's."""

from __future__ import annotations

from dataclasses import dataclass, field

from serving.base_handler import RequestState
from serving.contract import Instance, Limits, Parameters, Request, RequestError
from serving.detector import Count
from serving.looks import Budget
from serving.pictures import PictureError, annotate


@dataclass
class PictureState:
    """One picture of a request, and what was made of it.

    content: its bytes, while they are needed. annotated: a JPEG. error: why it could not be counted.
    """

    instance: Instance
    content: bytes | memoryview = b""
    count: Count | None = None
    annotated: bytes | None = None
    error: RequestError | PictureError | None = None


@dataclass
class PeopleState(RequestState):
    """A request and its pictures.

    pictures: an object of a bucket that the request names several times is one picture. places: for each instance, the
    index of its picture. budget: what is left for closer looks.
    """

    request: Request | None = None
    pictures: list[PictureState] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    budget: Budget = field(default_factory=lambda: Budget(0))

    @classmethod
    def of(cls, request: Request, limits: Limits) -> PeopleState:
        state = cls(request, budget=Budget(limits.looks, limits.look_seconds))
        first: dict[str, int] = {}
        for instance in request.instances:
            place = len(state.pictures) if instance.uri is None else first.setdefault(instance.uri, len(state.pictures))
            if place == len(state.pictures):
                state.pictures.append(PictureState(instance, instance.data or b"", error=instance.error))
            state.places.append(place)
        return state

    @property
    def parameters(self) -> Parameters:
        return self.request.parameters if self.request else Parameters()

    @property
    def annotated(self) -> bool:
        """Whether the answer has pictures with boxes."""
        return self.request is not None and (self.request.picture_wanted or self.parameters.annotate)


def annotate_count(data: bytes | memoryview, count: Count, parameters: Parameters, limits: Limits) -> bytes:
    """The picture as JPEG with what was counted drawn on it. Raises PictureError."""
    listed = count.people[: parameters.max_people]
    labels = [f"{person.confidence:.2f}" for person in listed]
    return annotate(data, [p.box for p in listed], labels, parameters.region, limits.max_pixels)
