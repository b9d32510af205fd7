"""The handler's batches, which TorchServe makes only where there is a GPU; here on the CPU."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from serving.handler import PeopleHandler


class Context(SimpleNamespace):
    """What TorchServe tells a handler, and what a handler tells it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(system_properties={"model_dir": str(folder), "gpu_id": None})
        self.statuses: dict[int, int] = {}

    def set_response_status(self, code: int, phrase: str, row: int) -> None:
        self.statuses[row] = code

    def set_response_content_type(self, row: int, value: str) -> None: ...

    def set_response_header(self, row: int, name: str, value: str) -> None: ...


def test_a_batch_answers_each_request_in_its_place(
    archive: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("workers", "busy", "spool"):
        (tmp_path / folder).mkdir()
    monkeypatch.setenv("HEADCOUNT_RUN_FOLDER", str(tmp_path))
    context: Any = Context(archive)
    handler = PeopleHandler()
    handler.initialize(context)
    bus, zidane = ((data / "people" / name).read_bytes() for name in ("bus.jpg", "zidane.jpg"))
    rows: list[dict[str, Any]] = [
        {"data": bus}, {"data": b"no picture"}, {"data": zidane}, {"data": bus, "confidence": b"0.6"}, {"data": bus},
    ]  # fmt: skip
    alone = [json.loads(handler.handle([row], context)[0]) for row in rows]
    shapes = []
    forward = handler.detector._forward

    def seen(batch: torch.Tensor) -> Sequence[torch.Tensor]:
        shapes.append(tuple(batch.shape))
        return forward(batch)

    handler.detector._forward = seen
    handler.detector.batches = True
    context.statuses.clear()
    together = [json.loads(answer) for answer in handler.handle(rows, context)]
    assert sorted(shapes) == [(1, 384, 640, 3), (3, 640, 480, 3)], "pictures of one shape go through it together"
    assert [answer.get("count") for answer in together] == [4, None, 2, 3, 4]
    assert context.statuses == {1: 400}
    for one, other in zip(alone, together, strict=True):
        assert one.get("count") == other.get("count")
