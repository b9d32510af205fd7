"""The Python client and its counters: against a small server that misbehaves, and against the real thing."""

from __future__ import annotations

import json
import time
from concurrent import futures
from email.utils import formatdate
from pathlib import Path
from typing import Any

import grpc
import pytest
from conftest import Server
from counting_stub import Stub, pictures, prediction, stub, waits

from headcount import Answer, Client, CountError, counters
from headcount.counters import Grpc, Rest
from serving.contract import Parameters

__all__ = ["pictures", "stub", "waits"]  # fixtures


def test_parameters_are_sent_and_the_route_is_added_once(stub: Stub) -> None:
    for url in (stub.url, f"{stub.url}/", f"{stub.url}/predictions/people", f"{stub.url}/predictions/people/"):
        with Client(url) as client:
            region = [(0, 0), (1, 0), (1, 0.5)]
            client.count(b"1", confidence=0.5, max_people=3, region=region, annotate=True, detail="full", grid="4x3")
    sent = {
        "detail": ["full"], "grid": ["4x3"],
        "confidence": ["0.5"], "max_people": ["3"], "annotate": ["true"],
        "region": ["[[0.0, 0.0], [1.0, 0.0], [1.0, 0.5]]"],
    }  # fmt: skip
    assert stub.requests == [("/predictions/people", sent)] * 4


def test_the_client_answers_with_numbers(stub: Stub, pictures: Path) -> None:
    with Client(stub.url) as client:
        answer = client.count(pictures / "below" / "A.JPG", annotate=True)
        assert (answer.count, answer.width, answer.height, answer.annotated) == (2, 30, 20, b"drawn 2")
        assert answer.people[0].box == (1, 2, 3, 4.5)
        with pytest.raises(ValueError, match="confidence is 7"):
            client.count(b"1", confidence=7)
        with pytest.raises(CountError, match=r"^this is not a picture$"):
            client.count(b"?")
    with pytest.raises(ValueError, match="give one of them"):
        Client(stub.url, grpc="localhost:7070")


def test_an_answer_says_how_it_was_counted() -> None:
    said = prediction(2) | {"looks": 5, "grid": [[1, 0], [0, 1]], "note": "there is more"}
    answer = Answer.from_json(said)
    assert (answer.looks, answer.grid, answer.note) == (5, [[1, 0], [0, 1]], "there is more")
    assert answer.as_json() == said
    del said["looks"]
    assert Answer.from_json(said).looks == 1, "servers of earlier versions do not say"


def busy(status: int, **headers: str) -> tuple[int, dict[str, str], str]:
    body = json.dumps({"error": {"code": status, "message": "the queue is full"}})
    return status, {name.replace("_", "-"): value for name, value in headers.items()}, body


def count(stub: Stub) -> int:
    with Client(stub.url) as client:
        return client.count(b"4").count


def test_a_busy_server_is_asked_again_when_it_says(stub: Stub, waits: list[float]) -> None:
    later = formatdate(time.time() + 12, usegmt=True)
    stub.refusals = [busy(429, Retry_After="7"), busy(503), busy(503, Retry_After=later)]
    assert count(stub) == 4
    assert waits[0] == 7
    assert 0.5 <= waits[1] <= 1
    assert 9 < waits[2] < 13


def test_a_server_that_stays_busy_is_given_up_with_its_words(stub: Stub, waits: list[float]) -> None:
    stub.refusals = [busy(429, Retry_After="999999")] * 100
    with pytest.raises(CountError, match=r"^the queue is full$"):
        count(stub)
    assert len(stub.requests) == 5
    assert waits == [30] * 4


def test_a_dropped_connection_is_tried_again(stub: Stub, waits: list[float]) -> None:
    stub.refusals = [None, None]
    assert count(stub) == 4
    assert (len(stub.requests), len(waits)) == (3, 2)


def test_an_unreachable_server_is_waited_for_once_not_for_every_picture(waits: list[float]) -> None:
    with Client("http://127.0.0.1:9") as client:
        for _ in range(3):
            with pytest.raises(CountError, match=r"^cannot reach http://127.0.0.1:9: .*refused; is the server up\?$"):
                client.count(b"1")
    assert len(waits) == 4


@pytest.mark.parametrize(
    ("refusal", "message"),
    [
        (busy(400), "^the queue is full$"),
        ((404, {}, "<html>not here</html>"), "answered HTTP 404 .*'<html>not here</html>'; check the address"),
        ((200, {}, "hello"), "answered HTTP 200 and not as Headcount does: 'hello'"),
        ((200, {}, "[1]"), r"the answer is not Headcount's: \[1\]; check the address"),
        ((200, {}, '{"count": "many"}'), "the answer is not Headcount's"),
    ],
)
def test_any_other_answer_is_an_error_at_once(
    stub: Stub, waits: list[float], refusal: tuple[int, dict[str, str], str], message: str
) -> None:
    stub.refusals = [refusal]
    with pytest.raises(CountError, match=message):
        count(stub)
    assert len(stub.requests) == 1


def test_grpc_speaks_torchserves_wire_format(waits: list[float]) -> None:
    """Bytes against bytes, written out by hand from inference.proto: field 1 name, 3 map entries; answer in 1."""
    seen: list[bytes] = []
    bodies = [b'{"error": {"code": 429, "message": "full"}}', json.dumps(prediction(2)).encode()]

    def answer(request: bytes, _: object) -> bytes:
        seen.append(request)
        body = bodies.pop(0)
        return b"\x0a" + bytes([len(body) % 128 + 128, len(body) // 128] if len(body) > 127 else [len(body)]) + body

    class Service(grpc.GenericRpcHandler):
        def service(self, call: Any) -> Any:
            assert call.method == "/org.pytorch.serve.grpc.inference.InferenceAPIsService/Predictions"
            return grpc.unary_unary_rpc_method_handler(answer)

    server = grpc.server(futures.ThreadPoolExecutor(1), handlers=[Service()])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        answered = Grpc(f"127.0.0.1:{port}").count(b"\xff\xd8", Parameters(confidence=0.5))
    finally:
        server.stop(None)
    assert answered == Answer.from_json(prediction(2))
    data, confidence = b"\x1a\x0a\x0a\x04data\x12\x02\xff\xd8", b"\x1a\x11\x0a\x0aconfidence\x12\x030.5"
    assert seen[0] in (b"\x0a\x06people" + data + confidence, b"\x0a\x06people" + confidence + data)
    assert len(waits) == 1


def test_an_unreachable_grpc_server_is_told(waits: list[float]) -> None:
    counter = Grpc("127.0.0.1:9")
    for _ in range(2):
        with pytest.raises(CountError, match=r"^cannot reach 127.0.0.1:9: .*is the server up\?$"):
            counter.count(b"1", Parameters())
    assert len(waits) == 4


def test_rest_and_grpc_count_as_this_process_does(server: Server, data: Path, checkpoint: Path) -> None:
    parameters = Parameters(confidence=0.4, max_people=2, region=((0, 0), (0.6, 0), (0.6, 1), (0, 1)), annotate=True)
    here = counters.InProcess(checkpoint)
    for counter in (Rest(server.url), Grpc(f"127.0.0.1:{server.grpc}")):
        for name in ("bus.jpg", "zidane.jpg"):
            picture = (data / "people" / name).read_bytes()
            assert counter.count(picture, parameters) == here.count(picture, parameters)
        with pytest.raises(CountError, match="the picture is damaged or cut short"):
            counter.count(picture[:50_000], parameters)
        counter.close()
    here.close()
