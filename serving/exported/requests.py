"""Requests to an exported model, and the answers to them. A module of its own, as request_state.py is for people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from serving.base_handler import RawRequest, Reply, RequestState, as_json
from serving.contract import Limits, RequestError, json_instances
from serving.exported.model_contract import InstanceError, Prediction

TOGETHER = 32  # instances that are computed together


@dataclass
class InstancesState(RequestState):
    """A request. answers: one for each instance, as far as they are computed."""

    instances: list[Any] = field(default_factory=list)
    answers: list[Prediction | InstanceError] = field(default_factory=list)


def parse(raw: RawRequest, model: str, limits: Limits) -> InstancesState:
    """A request to the model of this name. Raises RequestError."""
    shape = 'send {"instances": [{…}]}; /openapi.json describes an instance'
    kind = raw.content_type.partition(";")[0].strip().lower()
    if kind.startswith(("image/", "multipart/")):
        raise RequestError(f"this server has the model {model} and counts no people in pictures: {shape}")
    instances, parameters = json_instances(raw.data, shape, limits)
    if unknown := sorted({*parameters, *raw.fields}):
        raise RequestError(f"unknown parameter {unknown[0]!r}; the model {model} takes none")
    return InstancesState(instances=instances)


def reply(answers: Sequence[Prediction | InstanceError]) -> Reply:
    """The answer to a request. Raises RequestError if no instance of it could be predicted."""
    predictions = [
        RequestError(f"instances[{place}]: {one}") if isinstance(one, InstanceError) else one
        for place, one in enumerate(answers)
    ]
    errors = [one for one in predictions if isinstance(one, RequestError)]
    if len(errors) == len(predictions):
        raise errors[0]
    return Reply(
        as_json({"predictions": [one.as_json() if isinstance(one, RequestError) else one for one in predictions]})
    )
