"""The handler without TorchServe: what it holds, and the batches that TorchServe makes where there is a GPU."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from serving.handler import READERS, PeopleHandler
from serving.storage import StorageError


class Context(SimpleNamespace):
    """What TorchServe tells a handler, and what a handler tells it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(system_properties={"model_dir": str(folder), "gpu_id": None})
        self.statuses: dict[int, int] = {}

    def set_response_status(self, code: int, phrase: str, row: int) -> None:
        self.statuses[row] = code

    def set_response_content_type(self, row: int, value: str) -> None: ...

    def set_response_header(self, row: int, name: str, value: str) -> None: ...


@pytest.fixture
def context(archive: Path) -> Any:
    return Context(archive)


@pytest.fixture
def handler(context: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PeopleHandler:
    for folder in ("workers", "busy", "spool"):
        (tmp_path / folder).mkdir()
    monkeypatch.setenv("HEADCOUNT_RUN_FOLDER", str(tmp_path))
    monkeypatch.setenv("HEADCOUNT_BUCKETS", "photos")
    handler = PeopleHandler()
    handler.initialize(context)
    return handler


def test_objects_are_read_a_few_at_a_time(
    handler: PeopleHandler, context: Any, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bus = (data / "people" / "bus.jpg").read_bytes()
    held, most = 0, 0

    def read(uri: str, limit: int) -> bytes:
        nonlocal held, most
        held += 1
        most = max(most, held)
        if uri.endswith("/13"):
            raise StorageError(f"{uri} does not exist", 400)
        return bus

    def letterboxed(picture: Any, where: str) -> Any:
        nonlocal held
        held -= 1
        return letterbox(picture, where)

    letterbox = handler._letterbox
    monkeypatch.setattr("serving.handler.read_object", read)
    monkeypatch.setattr(handler, "_letterbox", letterboxed)
    instances = [{"image": {"uri": f"gs://photos/{i}"}} for i in range(20)]

    def ask(**parameters: Any) -> list[Any]:
        body = json.dumps({"instances": instances, "parameters": parameters}).encode()
        predictions: list[Any] = json.loads(handler.handle([{"data": body}], context)[0])["predictions"]
        assert [prediction.get("count") for prediction in predictions] == [4] * 13 + [None] + [4] * 6
        assert predictions[13]["error"]["message"] == "gs://photos/13 does not exist"
        return predictions

    ask()
    assert most == READERS
    assert all(len(one["annotated"]["b64"]) > 10_000 for one in ask(annotate=True) if "count" in one)


def test_a_batch_answers_each_request_in_its_place(handler: PeopleHandler, context: Any, data: Path) -> None:
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
