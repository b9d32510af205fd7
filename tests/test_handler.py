"""The handler without TorchServe: what it holds, and the batches that TorchServe makes where there is a GPU."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlencode

import numpy as np
import pytest
import simplejpeg
import torch
import yolo_checkpoint
from helpers import encode, instance
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_closer_looks import SQUARES, field

from serving import pictures
from serving.contract import COUNT_HEADER, DETAILS, Limits
from serving.handler import READERS, PeopleHandler
from serving.pictures import PictureError
from serving.run_folder import RunFolder
from serving.storage import StorageError


class Context(SimpleNamespace):
    """What TorchServe tells a handler, and what a handler tells it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(system_properties={"model_dir": str(folder), "gpu_id": None})
        self.statuses: dict[int, int] = {}
        self.headers: dict[str, str] = {}
        self.types: dict[int, str] = {}

    def set_response_status(self, code: int, phrase: str, row: int) -> None:
        self.statuses[row] = code

    def set_response_content_type(self, row: int, value: str) -> None:
        self.types[row] = value

    def set_response_header(self, row: int, name: str, value: str) -> None:
        self.headers[name] = value


@pytest.fixture
def context(archive: Path) -> Any:
    return Context(archive)


@contextlib.contextmanager
def set_up(archive: Path, run: Path) -> Iterator[PeopleHandler]:
    """A handler as TorchServe sets it up."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("HEADCOUNT_RUN_FOLDER", str(RunFolder.create(run).path))
        environment.setenv("HEADCOUNT_BUCKETS", "photos")
        handler = PeopleHandler()
        handler.initialize(Context(archive))
        yield handler


@pytest.fixture(scope="module")
def handler(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PeopleHandler]:
    with set_up(archive, tmp_path_factory.mktemp("run")) as one:
        yield one


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PeopleHandler]:
    """A handler with a tiny network, for which white squares are people."""
    folder = tmp_path_factory.mktemp("archive")
    yolo_checkpoint.write(folder / "squares.pt", yolo_checkpoint.make_seeing(["person"], "person"))
    with set_up(folder, tmp_path_factory.mktemp("run")) as one:
        yield one


THREE = yolo_checkpoint.squares(3)
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.just(instance(THREE)),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["image", "b64", "uri", "region", "x"]), inner, max_size=3)
    ),
    max_leaves=8,
)
PARAMETERS = st.fixed_dictionaries(
    {},
    optional={
        "confidence": st.floats(0.01, 1), "iou": st.floats(0, 1), "max_people": st.integers(0, 5),
        "annotate": st.booleans(), "region": st.just([[0, 0], [1, 0], [1, 0.5], [0, 0.5]]),
        "detail": st.sampled_from(DETAILS),
    },
)  # fmt: skip
BODIES = st.one_of(
    st.binary(max_size=200),
    st.just(THREE),
    st.binary(max_size=50).map(lambda tail: THREE[:60] + tail),
    st.one_of(
        st.fixed_dictionaries({}, optional={"instances": JSON_VALUES, "parameters": JSON_VALUES | PARAMETERS}),
        st.fixed_dictionaries(
            {"instances": st.lists(st.just(instance(THREE)) | JSON_VALUES, min_size=1, max_size=4)},
            optional={"parameters": PARAMETERS},
        ),
    )
    .map(json.dumps)
    .map(str.encode),
)


def check_error(answer: Any, code: int) -> None:
    assert set(answer) == {"error"}
    assert set(answer["error"]) == {"code", "status", "message"}
    assert (answer["error"]["code"], answer["error"]["status"]) == (code, "INVALID_ARGUMENT")
    assert len(answer["error"]["message"]) > 10


def check_prediction(answer: Any, model: dict[str, str], annotated: bool, most: int | None) -> int:
    assert set(answer) == {"count", "people", "image", "looks", "model"} | ({"annotated"} if annotated else set())
    assert answer["looks"] == 1, "the picture has no more pixels than the network sees"
    assert answer["model"] == model
    assert answer["image"] == {"width": 640, "height": 640}
    assert len(answer["people"]) == min(answer["count"], answer["count"] if most is None else most)
    for person in answer["people"]:
        assert set(person) == {"box", "confidence"}
        left, top, right, bottom = person["box"]
        assert 0 <= left <= right <= 640
        assert 0 <= top <= bottom <= 640
        assert 0 < person["confidence"] <= 1
    sure = [person["confidence"] for person in answer["people"]]
    assert sure == sorted(sure, reverse=True)
    if annotated:
        assert set(answer["annotated"]) == {"b64"}
        assert Image.open(io.BytesIO(base64.b64decode(answer["annotated"]["b64"]))).size == (640, 640)
    return int(answer["count"])


@settings(max_examples=300)
@given(
    body=BODIES,
    kind=st.sampled_from(["", "application/json", "image/png", "multipart/form-data; boundary=x"]),
    accept=st.sampled_from(["*/*", "image/jpeg", ","]),
    query=st.dictionaries(st.sampled_from(["confidence", "iou", "region", "x"]), st.text(max_size=10), max_size=2),
)
def test_any_request_is_answered_as_the_contract_says(
    quick: PeopleHandler, body: bytes, kind: str, accept: str, query: dict[str, str]
) -> None:
    name, context = "0" * 32, Context(Path())
    (quick.run_folder.spool / name).write_bytes(body)
    told = {"spooled": name, "size": len(body), "content_type": kind, "query": urlencode(query), "accept": accept}
    (answer,) = quick.handle([{"body": json.dumps(told).encode()}], context)
    model = quick.detector.model
    if context.statuses:
        assert context.statuses == {0: 400}
        check_error(json.loads(answer), 400)
        assert context.types[0] == "application/json"
        return
    if context.types[0] == "image/jpeg":
        assert accept == "image/jpeg"
        assert Image.open(io.BytesIO(answer)).size == (640, 640)
        assert context.headers[COUNT_HEADER] in ("0", "3")
        return
    assert context.types[0] == "application/json"
    content = json.loads(answer)
    if "predictions" not in content:
        assert body == THREE
        assert check_prediction(content, model, False, None) == int(context.headers[COUNT_HEADER])
        return
    assert set(content) == {"predictions"}
    request = json.loads(body)
    parameters = request.get("parameters") or {}
    assert len(content["predictions"]) == len(request["instances"])
    counted = 0
    for sent, said in zip(request["instances"], content["predictions"], strict=True):
        if sent == instance(THREE):
            annotated, most = parameters.get("annotate", False), parameters.get("max_people")
            counted += check_prediction(said, model, annotated, most)
        else:
            check_error(said, 400)
    assert counted == int(context.headers[COUNT_HEADER])


def test_a_batch_of_bad_instances_has_their_errors_if_it_asks_for_them(quick: PeopleHandler) -> None:
    bad = [instance(b"no picture"), {"b64": "bm8="}, 7]
    body = {"instances": bad, "parameters": {"inline_errors": True}}
    context = Context(Path())
    answers = json.loads(quick.handle([{"data": json.dumps(body).encode()}], context)[0])["predictions"]
    assert context.statuses == {}
    for i, answer in enumerate(answers):
        check_error(answer, 400)
        assert answer["error"]["message"].startswith(f"instances[{i}]")
    body["parameters"] = {}
    check_error(json.loads(quick.handle([{"data": json.dumps(body).encode()}], context)[0]), 400)
    assert context.statuses == {0: 400}


def uris(*names: object) -> list[dict[str, Any]]:
    return [{"image": {"uri": f"gs://photos/{name}"}} for name in names]


def predictions(handler: PeopleHandler, context: Any, instances: list[Any], **parameters: Any) -> list[Any]:
    body = json.dumps({"instances": instances, "parameters": parameters}).encode()
    answer: list[Any] = json.loads(handler.handle([{"data": body}], context)[0])["predictions"]
    return answer


@pytest.mark.parametrize("annotate", [False, True])
def test_objects_are_read_once_and_a_few_at_a_time(
    handler: PeopleHandler, context: Any, data: Path, monkeypatch: pytest.MonkeyPatch, annotate: bool
) -> None:
    """The objects of one request may be larger than the memory."""
    bus = (data / "people" / "bus.jpg").read_bytes()
    read: list[str] = []
    held = most = 0

    class Content(bytes):
        def __del__(self) -> None:
            nonlocal held
            held -= 1

    def read_object(uri: str, limit: int) -> bytes:
        nonlocal held, most
        read.append(uri)
        if uri.endswith("/13"):
            raise StorageError(f"{uri} does not exist", 400)
        held += 1
        most = max(most, held)
        return Content(bus)

    monkeypatch.setattr("serving.handler.read_object", read_object)
    answers = predictions(handler, context, uris(*range(20)), annotate=annotate)
    assert [answer.get("count") for answer in answers] == [4] * 13 + [None] + [4] * 6
    assert answers[13]["error"]["message"] == "gs://photos/13 does not exist"
    assert sorted(read) == sorted(f"gs://photos/{i}" for i in range(20))
    assert (most, held) == (READERS, 0)
    for answer in answers:
        assert ("annotated" in answer) == (annotate and "count" in answer)


def test_an_object_named_twice_is_read_once(
    handler: PeopleHandler, context: Any, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = {"gs://photos/bus": (data / "people" / "bus.jpg").read_bytes(), "gs://photos/bad": b"no picture"}
    read: list[str] = []

    def read_object(uri: str, limit: int) -> bytes:
        read.append(uri)
        return contents[uri]

    monkeypatch.setattr("serving.handler.read_object", read_object)
    sent = {"image": {"b64": base64.b64encode(contents["gs://photos/bus"]).decode()}}
    answers = predictions(handler, context, [*uris("bus", "bad", "bus"), sent, *uris(*["bus"] * 9, "bad")])
    assert sorted(read) == ["gs://photos/bad", "gs://photos/bus"]
    assert context.headers["X-Headcount-Count"] == "48"
    for i, answer in enumerate(answers):
        if i in (1, 13):
            assert answer["error"]["message"].startswith(f"instances[{i}]: this is not a picture")
        else:
            assert answer == answers[0]
            assert answer["count"] == 4


def test_a_picture_that_cannot_be_drawn_on_is_refused_in_its_place(
    handler: PeopleHandler, context: Any, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bus = base64.b64encode((data / "people" / "bus.jpg").read_bytes()).decode()

    def annotate(*_: object) -> bytes:
        raise PictureError("the picture is damaged")

    monkeypatch.setattr("serving.request_state.annotate", annotate)
    body = json.dumps({"instances": [{"image": {"b64": bus}}], "parameters": {"annotate": True}}).encode()
    answer = json.loads(handler.handle([{"data": body}], context)[0])
    assert answer["error"]["message"] == "instances[0]: the picture is damaged"
    assert context.headers.get("X-Headcount-Count") is None


def test_a_failure_of_the_network_is_told_and_does_not_last(
    handler: PeopleHandler, context: Any, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bus = (data / "people" / "bus.jpg").read_bytes()
    with monkeypatch.context() as broken:
        broken.setattr(handler.detector, "_forward", lambda batch: 1 / 0)
        answer = json.loads(handler.handle([{"data": bus}], context)[0])
        assert (answer["error"]["code"], context.statuses[0]) == (500, 500)
    assert json.loads(handler.handle([{"data": bus}], context)[0])["count"] == 4


@pytest.mark.parametrize("over_grpc", [True, False])
def test_a_worker_is_marked_while_it_answers_what_the_front_does_not_know(
    over_grpc: bool, quick: PeopleHandler, context: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    marked, predict = list[bool](), quick.predict

    def look(states: Any) -> None:
        marked.append(quick.run_folder.answers_grpc())
        predict(states)

    monkeypatch.setattr(quick, "predict", look)
    body = THREE if over_grpc else json.dumps({"instances": [instance(THREE)]}).encode()
    quick.handle([{"data" if over_grpc else "body": body}], context)
    assert marked == [over_grpc]
    assert not quick.run_folder.answers_grpc()


def test_no_file_outside_the_spool_is_read(handler: PeopleHandler, context: Any, data: Path) -> None:
    bus = (data / "people" / "bus.jpg").read_bytes()
    folder, good = handler.run_folder, "0123456789abcdef" * 2
    for file in (folder.path / "secret", folder.spool / ("0" * 31), folder.spool / ("G" * 32), folder.spool / good):
        file.write_bytes(bus)

    def ask(spooled: object) -> Any:
        told = {"spooled": spooled, "size": len(bus), "content_type": "", "query": "", "accept": ""}
        return json.loads(handler.handle([{"body": json.dumps(told).encode()}], context)[0])

    assert ask(good)["count"] == 4
    for bad in ("../secret", str(folder.path / "secret"), "0" * 31, "G" * 32, good + "\n", "", None, 7):
        assert ask(bad)["error"]["code"] == 400
    assert ask("f" * 32)["error"]["code"] == 503, "the front has given it up"


def test_a_batch_answers_each_request_in_its_place(
    handler: PeopleHandler, context: Any, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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

    monkeypatch.setattr(handler.detector, "_forward", seen)
    monkeypatch.setattr(handler.detector, "batches", True)
    context.statuses.clear()
    together = [json.loads(answer) for answer in handler.handle(rows, context)]
    assert sorted(shapes) == [(1, 384, 640, 3), (3, 640, 480, 3)], "pictures of one shape go through it together"
    assert [answer.get("count") for answer in together] == [4, None, 2, 3, 4]
    assert context.statuses == {1: 400}
    for one, other in zip(alone, together, strict=True):
        assert one.get("count") == other.get("count")


def test_a_request_has_so_many_looks_for_all_its_pictures(
    quick: PeopleHandler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sign of life is given for each of them, because health depends on it."""
    monkeypatch.setattr(quick, "limits", Limits(looks=30))
    alive: list[int] = []
    monkeypatch.setattr(quick.run_folder, "sign_of_life", lambda: alive.append(1))
    sent = [instance(encode(field()))] * 3
    context = Context(Path())
    first, second, third = predictions(quick, context, sent, detail="full")
    assert first["count"] == second["count"] == SQUARES
    assert first["looks"] == 13
    assert third["error"]["message"].startswith(
        "instances[2]: detail=full takes 12 closer looks at a picture of 1920×1440, and 6"
    )
    assert len(alive) > 24
    assert context.headers["X-Headcount-Count"] == str(2 * SQUARES)
    assert [answer["looks"] for answer in predictions(quick, context, sent, detail="fast")] == [1, 1, 1]
    monkeypatch.setattr(quick, "limits", Limits(look_seconds=0))
    fine, late = predictions(quick, context, [instance(yolo_checkpoint.squares(3)), sent[0]], detail="full")
    assert fine["count"] == 3
    assert "the time for them was over after 0" in late["error"]["message"]


def test_a_picture_that_is_damaged_where_only_tiles_look_is_refused_in_its_place(
    quick: PeopleHandler, monkeypatch: pytest.MonkeyPatch
) -> None:
    jpeg = simplejpeg.encode_jpeg(np.asarray(field()))

    def broken(*_: object) -> pictures.Pixels:
        raise PictureError("the picture is damaged")

    monkeypatch.setattr(pictures, "upright", broken)
    for batches in (False, True):
        monkeypatch.setattr(quick.detector, "batches", batches)
        good, bad = predictions(
            quick, Context(Path()), [instance(yolo_checkpoint.squares(3)), instance(jpeg)], detail="full"
        )
        assert (good["count"], good["looks"]) == (3, 1)
        assert bad["error"]["message"] == "instances[1]: the picture is damaged"


def test_every_way_in_takes_detail_and_grid(quick: PeopleHandler) -> None:
    picture = encode(field())
    form = (
        b'--x\r\nContent-Disposition: form-data; name="detail"\r\n\r\nfull\r\n'
        b'--x\r\nContent-Disposition: form-data; name="grid"\r\n\r\n2x1\r\n'
        b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n' + picture + b"\r\n--x--\r\n"
    )
    wanted = {"detail": "full", "grid": "2x1"}
    body = json.dumps({"instances": [instance(picture)], "parameters": wanted}).encode()
    over_grpc = {"data": picture, **{name: text.encode() for name, text in wanted.items()}}

    def spooled(content: bytes, kind: str, query: str) -> dict[str, bytes]:
        name = uuid.uuid4().hex
        (quick.run_folder.spool / name).write_bytes(content)
        told = {"spooled": name, "size": len(content), "content_type": kind, "query": query, "accept": ""}
        return {"body": json.dumps(told).encode()}

    for row in (
        over_grpc, {"data": body}, spooled(picture, "image/png", "detail=full&grid=2x1"),
        spooled(form, "multipart/form-data; boundary=x", ""), spooled(body, "application/json", ""),
    ):  # fmt: skip
        answer = json.loads(quick.handle([row], Context(Path()))[0])
        answer = answer["predictions"][0] if "predictions" in answer else answer
        assert (answer["count"], answer["looks"], answer["grid"]) == (SQUARES, 13, [[15, 15]])
    refused = json.loads(quick.handle([{"data": picture, "detail": b"close"}], Context(Path()))[0])
    assert refused["error"]["message"] == "detail is 'close'; it must be fast, full or auto"
