"""The real server, spoken to over REST and gRPC: what it answers, what it survives, and how it ends."""

from __future__ import annotations

import base64
import contextlib
import http.server
import io
import json
import os
import random
import re
import signal
import socket
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from conftest import Server, running
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from headcount import Client, CountError
from headcount.torchserve_grpc import METHOD, PredictionResponse, PredictionsRequest
from serving.contract import COUNT_HEADER
from serving.run_folder import sweep
from serving.torchserve import GPU_BATCH

pytestmark = pytest.mark.timeout(240)
KILLS = 2  # TorchServe waits longer and longer until it starts a worker again


@pytest.fixture(scope="session")
def bus(data: Path) -> bytes:
    return (data / "people" / "bus.jpg").read_bytes()


@pytest.fixture(scope="session")
def zidane(data: Path) -> bytes:
    return (data / "people" / "zidane.jpg").read_bytes()


@pytest.fixture(scope="module")
def tight(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with small limits, whose one worker is soon busy."""
    limits = {
        "WORKERS": "1", "QUEUE": "3", "BODY_TIMEOUT": "3", "MAX_REQUEST_BYTES": "1000000", "MAX_PIXELS": "20000000",
        "STUCK_SECONDS": "60",
    }  # fmt: skip
    with running(archive, tmp_path_factory.mktemp("tight") / "log",
                 **{f"HEADCOUNT_{name}": value for name, value in limits.items()}) as one:  # fmt: skip
        yield one


def encode(picture: Image.Image, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    picture.save(out, kind)
    return out.getvalue()


def inst(data: bytes) -> dict[str, Any]:
    return {"image": {"b64": base64.b64encode(data).decode()}}


def post(server: Server, content: Any = b"", **options: Any) -> httpx.Response:
    return httpx.post(server.predict, content=content, timeout=60, **options)


def post_json(server: Server, instances: object, **parameters: Any) -> httpx.Response:
    body = json.dumps({"instances": instances, "parameters": parameters}, allow_nan=True)
    return post(server, body.encode(), headers={"Content-Type": "application/json"})


def counts_four(server: Server, bus: bytes) -> None:
    answer = post(server, bus)
    assert (answer.status_code, answer.json().get("count")) == (200, 4), answer.text


def refused(answer: httpx.Response, status: int, says: str) -> None:
    """The answer is the error the contract describes."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    error = answer.json()["error"]
    assert error["code"] == status
    assert re.fullmatch("[A-Z_]+", error["status"])
    assert says in error["message"]


def run_folder(server: Server) -> Path:
    """Where the launcher keeps everything, as Java's command line names it."""
    for pid in server.processes():
        with contextlib.suppress(OSError):
            if found := re.search(rb"-Djava\.io\.tmpdir=([^\0]+)", Path(f"/proc/{pid}/cmdline").read_bytes()):
                return Path(found[1].decode())
    raise AssertionError("no Java below the launcher")


def living(pids: list[int]) -> list[str]:
    """What still runs of these: state and name. A process that has ended and waits to be reaped does not run."""
    stats = []
    for pid in pids:
        with contextlib.suppress(OSError):
            stats.append(Path(f"/proc/{pid}/stat").read_text())
    return [stat for stat in stats if stat.rpartition(")")[2].split()[0] not in ("Z", "X")]


def gone(pids: list[int]) -> bool:
    return not living(pids)


def eventually(holds: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


# What is answered


def test_raw_picture(server: Server, bus: bytes) -> None:
    answer = post(server, bus, params={"max_people": 2})
    content = answer.json()
    assert list(content) == ["count", "people", "image", "model"]
    assert content["count"] == 4, "max_people caps the list, never the count"
    assert content["image"] == {"width": 810, "height": 1080}
    assert content["model"]["name"] == "yolov5n"
    assert answer.headers[COUNT_HEADER] == "4"
    first, second = content["people"]
    assert first["confidence"] >= second["confidence"] > 0.5
    left, top, right, bottom = first["box"]
    assert 0 <= left < right <= 810
    assert 0 <= top < bottom <= 1080


def test_form(server: Server, bus: bytes) -> None:
    answer = httpx.post(server.predict, files={"image": ("bus.jpg", bus)}, data={"confidence": "0.6"}, timeout=60)
    assert answer.json()["count"] == 3


def test_json_keeps_order_and_counts_the_good_among_the_bad(server: Server, bus: bytes, zidane: bytes) -> None:
    instances = [inst(zidane), inst(b"no picture"), inst(bus), {"image": {"b64": "?"}}, inst(bus[: len(bus) // 2])]
    answer = post_json(server, instances)
    assert answer.status_code == 200
    first, second, third, fourth, fifth = answer.json()["predictions"]
    assert (first["count"], third["count"]) == (2, 4)
    for i, bad in ((1, second), (3, fourth), (4, fifth)):
        assert bad["error"]["code"] == 400
        assert f"instances[{i}]" in bad["error"]["message"]


def test_parameters_hold_for_json(server: Server, bus: bytes) -> None:
    left_half = [[0, 0], [0.5, 0], [0.5, 1], [0, 1]]
    whole, half, sure = (
        post_json(server, [inst(bus)], **p).json()["predictions"][0]
        for p in ({}, {"region": left_half}, {"confidence": 0.6, "max_people": 1})
    )
    inside = [p for p in whole["people"] if (p["box"][0] + p["box"][2]) / 2 <= 405]
    assert half["people"] == inside
    assert 0 < half["count"] < 4
    assert (sure["count"], len(sure["people"])) == (3, 1)


def test_annotated_picture(server: Server, bus: bytes) -> None:
    drawn = post(server, bus, headers={"Accept": "image/jpeg"})
    assert (drawn.headers["content-type"], drawn.headers[COUNT_HEADER]) == ("image/jpeg", "4")
    prediction = post_json(server, [inst(bus)], annotate=True).json()["predictions"][0]
    for data in (drawn.content, base64.b64decode(prediction["annotated"]["b64"])):
        picture = Image.open(io.BytesIO(data))
        assert (picture.format, picture.size) == ("JPEG", (810, 1080))
        left, top, _, bottom = prediction["people"][0]["box"]
        red, green, blue = picture.convert("RGB").getpixel((round(left), round((top + bottom) / 2)))  # type: ignore[misc]
        assert green > max(red, blue) + 60, "the left side of a box is drawn there"


def test_grpc(server: Server, bus: bytes) -> None:
    with Client(grpc=f"127.0.0.1:{server.grpc}") as client:
        assert client.count(bus).count == 4
        answer = client.count(bus, confidence=0.6, region=[(0, 0), (1, 0), (1, 1), (0, 1)], annotate=True)
        assert answer.count == 3
        assert Image.open(io.BytesIO(answer.annotated or b"")).size == (810, 1080)
        with pytest.raises(CountError, match="not a picture"):
            client.count(b"no picture")
        assert client.count(bus).count == 4


def test_where_there_is_a_gpu_requests_are_answered_together(
    archive: Path, tmp_path: Path, bus: bytes, zidane: bytes
) -> None:
    """TorchServe's batches, as they are set up for a GPU; the arithmetic is a CPU's."""
    program = (
        "from serving import capacity, launcher, torchserve; "
        "capacity.gpus = lambda: 1; torchserve.GPU_BATCH_DELAY = 5000; launcher.main()"
    )
    environment = {"HEADCOUNT_WORKERS": "1", "HEADCOUNT_STUCK_SECONDS": "100"}  # no probes
    server = Server(archive, environment, tmp_path / "log", program=("-c", program)).start()
    asked = [(bus, 4), (zidane, 2), (b"no picture", None), (SMALL, 0)] * (GPU_BATCH // 4)

    def ask(i: int) -> tuple[httpx.Response, float]:
        began = time.monotonic()
        accept = {"Accept": "image/jpeg"} if i < 4 else {}
        answer = post(server, asked[i][0], headers={"x-request-id": f"request-{i}", **accept})
        return answer, time.monotonic() - began

    try:
        server.wait()
        assert ask(1)[1] > 5, "one alone waits for others"
        with ThreadPoolExecutor(len(asked)) as pool:
            answers = list(pool.map(ask, range(len(asked))))
        assert max(seconds for _, seconds in answers) < 5, "as many as go together wait for nobody"
        for i, ((_, count), (answer, _)) in enumerate(zip(asked, answers, strict=True)):
            assert answer.headers["x-request-id"] == f"request-{i}"
            if count is None:
                refused(answer, 400, "not a picture")
                continue
            assert answer.headers[COUNT_HEADER] == str(count)
            if i < 4:
                assert Image.open(io.BytesIO(answer.content)).format == "JPEG"
            else:
                assert answer.json()["count"] == count
    finally:
        server.stop()


def test_grpc_takes_json_and_refuses_the_rest(server: Server, bus: bytes, zidane: bytes) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc}") as channel:
        predict = channel.unary_unary(METHOD, PredictionsRequest.SerializeToString, PredictionResponse.FromString)

        def ask(**fields: bytes) -> Any:
            return json.loads(predict(PredictionsRequest(model_name="people", input=fields), timeout=60).prediction)

        answer = ask(data=json.dumps({"instances": [inst(zidane), inst(bus)]}).encode())
        assert [p["count"] for p in answer["predictions"]] == [2, 4]
        for bad in ({"body": bus}, {"body": b'{"spooled": "../secret"}'}, {"picture": bus}, {}):
            assert ask(**bad)["error"]["code"] == 400
        assert ask(data=bus)["count"] == 4


def test_grpc_bodies_have_the_limit_too(tight: Server, bus: bytes) -> None:
    with Client(grpc=f"127.0.0.1:{tight.grpc}") as client:
        with pytest.raises(CountError, match="larger than"):
            client.count(bytes(1_100_000))
        assert client.count(bus).count == 4


def test_what_is_not_there_says_what_is(server: Server) -> None:
    refused(httpx.get(f"{server.url}/models"), 404, "/predictions/people")
    refused(httpx.get(server.predict), 405, "POST")


# Bad input

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
SMALL = encode(NOISE)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "body is empty"),
        (b"this is no picture", "not a picture"),
        (encode(NOISE, "JPEG")[:1500], "damaged or cut short"),
        (encode(Image.new("1", (30000, 30000))), "30000×30000 pixels; at most 50 megapixels"),
        (b"[1, 2]", "not a picture"),
    ],
    ids=["empty", "no picture", "truncated", "bomb", "JSON list"],
)
def test_a_bad_picture_is_refused(server: Server, bus: bytes, body: bytes, says: str) -> None:
    refused(post(server, body), 400, says)
    counts_four(server, bus)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("[1, 2]", "not an object"),
        ("{", "not valid JSON"),
        ("{}", "instances is missing"),
        ('{"instances": []}', "instances is empty"),
        (json.dumps({"instances": [inst(SMALL)] * 129}), "at most 128"),
        ('{"instances": [{"image": {"b64": "%%%"}}]}', "instances[0].image.b64 is not base64"),
        (json.dumps({"instances": [inst(b"no picture")]}), "instances[0]: this is not a picture"),
        ('{"instances": [{"image": {"uri": "gs://secret/a.jpg"}}]}', "'secret' is not one this server may read"),
        ('{"instances": [{"image": {"uri": "http://127.0.0.1/a.jpg"}}]}', "only gs://bucket/object"),
        ('{"instances": [{"image": {"uri": "file:///etc/passwd"}}]}', "only gs://bucket/object"),
    ],
)
def test_bad_json_is_refused(server: Server, bus: bytes, body: str, says: str) -> None:
    refused(post(server, body, headers={"Content-Type": "application/json"}), 400, says)
    counts_four(server, bus)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("certainty", 1, "unknown parameter 'certainty'"),
        ("confidence", -1, "confidence"),
        ("confidence", 2, "confidence"),
        ("confidence", float("nan"), "confidence"),
        ("confidence", "high", "'high'"),
        ("region", [[0, 0], [1, 1]], "2 points"),
        ("region", [[0, 0], [1, 1], [1, 0], [0, 1]], "crosses itself"),
    ],
)
def test_a_bad_parameter_is_refused(server: Server, bus: bytes, name: str, value: object, says: str) -> None:
    refused(post_json(server, [inst(SMALL)], **{name: value}), 400, says)
    refused(post(server, SMALL, params={name: value if isinstance(value, str) else json.dumps(value)}), 400, says)
    counts_four(server, bus)


def connect(server: Server, head: str, body: bytes = b"") -> socket.socket:
    one = socket.create_connection(("127.0.0.1", server.port), timeout=20)
    one.sendall(f"POST /predictions/people HTTP/1.1\r\nHost: x\r\n{head}\r\n\r\n".encode() + body)
    return one


def read_all(one: socket.socket) -> bytes:
    """What comes until the server closes the connection."""
    with one:
        return b"".join(iter(lambda: one.recv(65536), b""))


def chunks(size: int) -> Iterator[bytes]:
    while size > 0:
        yield bytes(min(size, 100_000))
        size -= 100_000


def test_a_body_over_the_limit_is_refused(tight: Server, bus: bytes) -> None:
    refused(post(tight, bytes(1_000_001)), 413, "larger than 1 MB")
    counts_four(tight, bus)
    refused(post(tight, chunks(1_100_000)), 413, "larger than 1 MB")
    counts_four(tight, bus)
    endless = read_all(connect(tight, "Transfer-Encoding: chunked", b"186a0\r\n" + bytes(100_000) + b"\r\n"))  # no end
    assert endless.startswith(b"HTTP/1.1 408")
    counts_four(tight, bus)


def test_a_client_that_asks_first_is_told_before_it_sends(tight: Server, bus: bytes) -> None:
    head = "Expect: 100-continue\r\nContent-Length: {}"
    answer = read_all(connect(tight, head.format(1_000_001)))
    assert answer.startswith(b"HTTP/1.1 413"), "and not 100 before it"
    with connect(tight, head.format(len(bus)) + "\r\nConnection: close") as one:
        assert one.recv(100).startswith(b"HTTP/1.1 100 Continue")
        one.sendall(bus)
        assert b'"count":4' in read_all(one)


def test_a_client_that_disconnects_half_way_leaves_nothing(tight: Server, bus: bytes) -> None:
    spool = run_folder(tight) / "spool"
    one = connect(tight, "Content-Length: 900000", bytes(300_000))
    assert eventually(lambda: any(file.stat().st_size for file in spool.iterdir()), 5), "half a body arrived"
    one.close()
    assert eventually(lambda: not any(spool.iterdir()), 5)
    counts_four(tight, bus)


def test_a_bodys_file_is_used_again_and_then_goes(tight: Server, bus: bytes) -> None:
    spool = run_folder(tight) / "spool"
    counts_four(tight, bus)
    for body in (SMALL, bus, SMALL):  # a short one after a long one is not mixed with its rest
        assert post(tight, body).json()["count"] == (4 if body is bus else 0)
    refused(post(tight, b""), 400, "body is empty")
    assert eventually(lambda: not any(spool.iterdir()), 5), "no picture stays"


def test_requests_sent_before_the_answer_are_answered_in_order(tight: Server, bus: bytes) -> None:
    head = "POST /predictions/people HTTP/1.1\r\nHost: x\r\n"
    bodies = (SMALL, bus, SMALL)
    following = b"".join(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body for body in bodies[1:-1])
    last = f"{head}Connection: close\r\nContent-Length: {len(SMALL)}\r\n\r\n".encode() + SMALL
    answers = read_all(connect(tight, f"Content-Length: {len(SMALL)}", SMALL + following + last))
    assert re.findall(rb'"count":(\d)', answers) == [b"0", b"4", b"0"]


def test_a_body_in_parts_is_put_together(tight: Server, bus: bytes) -> None:
    parts = (bus[at : at + 70_000] for at in range(0, len(bus), 70_000))
    assert post(tight, parts).json()["count"] == 4


def test_a_slow_client_holds_no_worker_and_is_told(tight: Server, bus: bytes) -> None:
    began = time.monotonic()
    slow = [connect(tight, f"Content-Length: {len(bus)}", bus[:1000]) for _ in range(20)]
    counts_four(tight, bus)
    assert time.monotonic() - began < 3, "the one worker answered others while twenty were sending"
    for one in slow:
        answer = read_all(one)
        assert answer.startswith(b"HTTP/1.1 408")
        assert b"DEADLINE_EXCEEDED" in answer
    counts_four(tight, bus)


def test_a_full_queue_says_when_to_come_back(tight: Server, bus: bytes) -> None:
    began = time.monotonic()
    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(lambda _: post(tight, bus), range(24)))
    assert time.monotonic() - began < 15
    busy = [answer for answer in answers if answer.status_code == 429]
    assert {answer.status_code for answer in answers} == {200, 429}
    for answer in busy:
        refused(answer, 429, "busy")
        assert int(answer.headers["retry-after"]) >= 1
    assert all(answer.json()["count"] == 4 for answer in answers if answer.status_code == 200)
    counts_four(tight, bus)


def test_limits_can_be_set(tight: Server, bus: bytes) -> None:
    refused(post(tight, encode(Image.new("1", (5000, 5000)))), 400, "at most 20 megapixels")
    counts_four(tight, bus)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.just(inst(SMALL)),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["image", "b64", "uri", "region", "x"]), inner, max_size=3)
    ),
    max_leaves=8,
)
BODIES = st.one_of(
    st.binary(max_size=200),
    st.binary(max_size=50).map(lambda tail: SMALL[:60] + tail),
    st.fixed_dictionaries({}, optional={"instances": JSON_VALUES, "parameters": JSON_VALUES})
    .map(json.dumps)
    .map(str.encode),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    body=BODIES,
    kind=st.sampled_from(["", "application/json", "image/png", "multipart/form-data; boundary=x"]),
    accept=st.sampled_from(["*/*", "image/jpeg", ","]),
    query=st.dictionaries(st.sampled_from(["confidence", "iou", "region", "x"]), st.text(max_size=10), max_size=2),
)
def test_any_request_is_answered_as_the_contract_says(
    server: Server, body: bytes, kind: str, accept: str, query: dict[str, str]
) -> None:
    answer = post(server, body, headers={"Content-Type": kind, "Accept": accept}, params=query)
    if answer.status_code != 200:
        refused(answer, 400, " ")


def test_after_any_request_the_next_is_right(server: Server, bus: bytes) -> None:
    counts_four(server, bus)


def test_ten_thousand_mutated_pictures_cost_no_worker(server: Server, bus: bytes) -> None:
    before = server.workers()
    rng = random.Random(1)
    # Flat pictures, which the network is done with soon.
    strip = NOISE.resize((160, 8))
    originals = [encode(strip, kind) for kind in ("JPEG", "PNG", "WEBP", "GIF")]

    def mutated() -> bytes:
        data = bytearray(rng.choice(originals))
        for _ in range(rng.choice((1, 2, 4, 30))):
            data[rng.randrange(len(data))] = rng.randrange(256)
        return bytes(data[: rng.randrange(1, len(data))] if rng.random() < 0.1 else data)

    requests = [[inst(mutated()) for _ in range(100)] for _ in range(100)]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda instances: post_json(server, instances), requests))
    assert {answer.status_code for answer in answers} == {200}
    predictions = [p for answer in answers for p in answer.json()["predictions"]]
    assert len(predictions) == 10_000
    errors = [p for p in predictions if "error" in p]
    assert 1000 < len(errors) < 9000, "some could be read and some not"
    assert {p["error"]["code"] for p in errors} == {400}
    assert server.workers() == before
    counts_four(server, bus)


def test_no_request_gets_another_s_answer(archive: Path, tmp_path: Path, bus: bytes, zidane: bytes) -> None:
    """Files of bodies are used again: while clients leave and workers are killed, none may be used too soon."""
    right = {bus: 4, zidane: 2, SMALL: 0}
    statuses: list[int] = []
    stop = threading.Event()

    def leaves(rng: random.Random, body: bytes) -> None:
        sent = rng.choice((rng.randrange(len(body)), len(body)))
        with connect(server, f"Content-Length: {len(body)}", body[:sent]):
            time.sleep(rng.uniform(0, 0.05))

    def client(seed: int) -> None:
        rng = random.Random(seed)
        while not stop.is_set():
            body = rng.choice(list(right))
            if rng.random() < 0.2:
                with contextlib.suppress(OSError):
                    leaves(rng, body)
                continue
            answer = post(server, body)
            statuses.append(answer.status_code)
            assert answer.status_code in (200, 429, 503)
            if answer.status_code == 200:
                assert answer.json()["count"] == right[body]

    with running(archive, tmp_path / "log", HEADCOUNT_QUEUE="6") as server, ThreadPoolExecutor(8) as pool:
        clients = [pool.submit(client, seed) for seed in range(8)]
        for _ in range(KILLS):
            time.sleep(3)
            with contextlib.suppress(ProcessLookupError):
                os.kill(server.workers()[0], signal.SIGKILL)
        server.wait()
        time.sleep(2)
        stop.set()
        for one in clients:
            one.result()
        assert {200, 429, 503} == set(statuses)
        assert statuses.count(200) > 40
        counts_four(server, bus)
        assert eventually(lambda: not any((run_folder(server) / "spool").iterdir()), 5)


# Health


def test_ready_means_that_the_next_picture_is_counted(archive: Path, tmp_path: Path, bus: bytes) -> None:
    server = Server(archive, {"HEADCOUNT_WORKERS": "1"}, tmp_path / "log").start()
    try:
        server.wait(503)
        assert post(server, bus).status_code == 503
        server.wait(200)
        counts_four(server, bus)
    finally:
        assert server.stop() == 0


def test_ping_follows_the_workers(archive: Path, tmp_path: Path, bus: bytes) -> None:
    with running(archive, tmp_path / "log", HEADCOUNT_STUCK_SECONDS="2") as server:
        many = [inst(encode(Image.new("RGB", (3000, 3000))))] * 20
        with ThreadPoolExecutor(2) as pool:
            long = [pool.submit(post_json, server, many, annotate=True) for _ in range(2)]
            began = time.monotonic()
            while not all(one.done() for one in long):
                assert httpx.get(f"{server.url}/ping").status_code == 200, "busy is not stuck"
                time.sleep(0.1)
            assert {one.result().status_code for one in long} == {200}
            assert time.monotonic() - began > 3

        dead = server.workers()
        assert len(dead) == 2
        for pid in dead:
            os.kill(pid, signal.SIGKILL)
        assert server.wait(503, 5) < 1.5
        refused(post(server, bus), 503, "worker")
        server.wait(200)
        counts_four(server, bus)
        assert eventually(lambda: len(server.workers()) == 2, 30)
        assert not set(dead) & set(server.workers())
        time.sleep(1)  # the second one sets itself up
        server.wait(200)

        first, second = stuck = server.workers()
        os.kill(first, signal.SIGSTOP)
        try:
            for _ in range(50):
                assert httpx.get(f"{server.url}/ping").status_code == 200, "the other worker can predict"
                time.sleep(0.1)
            os.kill(second, signal.SIGSTOP)
            assert server.wait(503, 10) < 4
        finally:
            for pid in stuck:
                os.kill(pid, signal.SIGCONT)
        assert server.wait(200, 10) < 5
        assert server.workers() == stuck
        counts_four(server, bus)


def test_ping_is_answered_within_a_second_under_full_load(server: Server, bus: bytes) -> None:
    until = time.monotonic() + 5

    def load(_: int) -> set[int]:
        seen = set()
        with httpx.Client(timeout=60) as client:
            while time.monotonic() < until:
                seen.add(client.post(server.predict, content=bus).status_code)
        return seen

    took = []
    with ThreadPoolExecutor(16) as pool:
        loads = pool.map(load, range(16))
        with httpx.Client(timeout=10) as client:
            while time.monotonic() < until:
                began = time.monotonic()
                assert client.get(f"{server.url}/ping").status_code == 200
                took.append(time.monotonic() - began)
                time.sleep(0.05)
        assert set.union(*loads) <= {200, 429}
    assert max(took) < 1
    assert len(took) > 10


# Start and end


def last_line(server: Server) -> dict[str, object]:
    return server.log_lines()[-1]


def test_broken_weights_end_the_server_with_the_reason(archive: Path, tmp_path: Path) -> None:
    broken = tmp_path / "archive"
    (broken / "MAR-INF").mkdir(parents=True)
    for file in archive.rglob("*"):
        if file.is_file():
            content = b"PK\x03\x04 no weights" if file.suffix == ".pt" else file.read_bytes()
            (broken / file.relative_to(archive)).write_bytes(content)
    server = Server(broken, {}, tmp_path / "log").start()
    assert server.process is not None
    assert server.process.wait(60) == 1
    assert last_line(server)["severity"] == "CRITICAL"
    assert "yolov5n.pt" in str(last_line(server)["message"])


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"AIP_HTTP_PORT": "{taken}"}, "cannot listen on 127.0.0.1:{taken}: Address already in use"),
        ({"HEADCOUNT_GRPC": "127.0.0.1:{taken}"}, "cannot listen on 127.0.0.1:{taken}: Address already in use"),
        ({"AIP_HTTP_PORT": "http"}, "AIP_HTTP_PORT is 'http'"),
        ({"HEADCOUNT_GRPC": "7070"}, "'7070' is not HOST:PORT"),
        ({"HEADCOUNT_WORKERS": "two"}, "HEADCOUNT_WORKERS is 'two'"),
        ({"HEADCOUNT_MAX_PIXELS": "50MP"}, "HEADCOUNT_MAX_PIXELS is '50MP'"),
        ({"AIP_STORAGE_URI": "/nowhere"}, "AIP_STORAGE_URI is /nowhere, where there are 0 .pt files"),
        ({"JAVA_HOME": "/nowhere"}, "JAVA_HOME is /nowhere"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_server_that_cannot_start_says_why(
    archive: Path, tmp_path: Path, environment: dict[str, str], says: str
) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        taken = str(holder.getsockname()[1])
        environment = {name: value.replace("{taken}", taken) for name, value in environment.items()}
        server = Server(archive, environment, tmp_path / "log").start()
        assert server.process is not None
        assert server.process.wait(60) == 1
    assert last_line(server)["severity"] == "CRITICAL"
    assert says.replace("{taken}", taken) in str(last_line(server)["message"])


def test_sigterm_finishes_what_is_in_flight_and_leaves_nothing(archive: Path, tmp_path: Path) -> None:
    with running(archive, tmp_path / "log", HEADCOUNT_WORKERS="1", HEADCOUNT_GRACE_SECONDS="0") as server:
        folder, processes = run_folder(server), server.processes()
        large = encode(Image.new("RGB", (6000, 6000)))
        with ThreadPoolExecutor(2) as pool, Client(grpc=f"127.0.0.1:{server.grpc}") as client:
            rest = pool.submit(post_json, server, [inst(large)] * 3)
            remote = pool.submit(client.count, large)
            assert eventually(lambda: gauge(server, "headcount_queue") == 1, 5)
            began = time.monotonic()
            assert server.process is not None
            server.process.terminate()
            assert server.wait(503, 2) < 1
            refused(post(server, SMALL), 503, "shutting down")
            assert [p["count"] for p in rest.result().json()["predictions"]] == [0] * 3
            assert remote.result().count == 0
        assert server.stop() == 0
        assert time.monotonic() - began < 10
        assert not folder.exists()
        assert eventually(lambda: gone(processes), 2)


def test_sigterm_before_it_is_ready_ends_it_too(archive: Path, tmp_path: Path) -> None:
    server = Server(archive, {}, tmp_path / "log").start()
    server.wait(503)
    processes = server.processes()
    assert server.stop() == 0
    assert eventually(lambda: gone(processes), 2)


def test_sigkill_of_the_launcher_leaves_nothing_for_long(archive: Path, tmp_path: Path) -> None:
    with running(archive, tmp_path / "log") as server:
        # A worker that TorchServe has not connected to yet would wait 30 s for it.
        assert eventually(lambda: "headcount_workers 2.0" in httpx.get(f"{server.url}/metrics").text, 30)
        processes, folder = server.processes(), run_folder(server)
        assert len(processes) >= 3
        os.utime(folder / "lock", (0, 0))
        sweep(folder.parent)
        assert folder.exists(), "its launcher is alive"
        server.stop(signal.SIGKILL)
        assert eventually(lambda: gone(processes), 15), living(processes)
        sweep(folder.parent)  # as the next launcher does
        assert not folder.exists()


# As Vertex AI starts it


class FakeStorage(http.server.BaseHTTPRequestHandler):
    """Objects over Cloud Storage's JSON API: a listing by prefix, and media."""

    objects: dict[str, bytes] = {}  # noqa: RUF012

    def do_GET(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        _, _, _, _, bucket, _, *name = url.path.split("/")
        query = urllib.parse.parse_qs(url.query)
        if name and query.get("alt") == ["media"]:
            content = self.objects.get(f"{bucket}/{urllib.parse.unquote(name[0])}")
        else:
            prefix = f"{bucket}/{query['prefix'][0]}"
            found = [key.partition("/")[2] for key in self.objects if key.startswith(prefix)]
            content = json.dumps({"items": [{"name": key} for key in found]}).encode()
        self.send_response(404 if content is None else 200)
        self.send_header("Content-Length", str(len(content or b"")))
        self.end_headers()
        self.wfile.write(content or b"")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def storage() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), FakeStorage) as one:
        threading.Thread(target=one.serve_forever).start()
        yield f"http://127.0.0.1:{one.server_port}"
        one.shutdown()


def listening(pids: list[int]) -> set[tuple[str, int]]:
    """Addresses the processes accept TCP connections on."""
    inodes = set()
    for pid in pids:
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                inodes.add(str(fd.readlink()))
    found = set()
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                address, port = fields[1].split(":")
                words = [bytes.fromhex(address[i : i + 8])[::-1] for i in range(0, len(address), 8)]
                found.add((socket.inet_ntop(family, b"".join(words)).removeprefix("::ffff:"), int(port, 16)))
    return found


def test_vertex_environment(
    archive: Path, tmp_path: Path, data: Path, checkpoint: Path, bus: bytes, storage: str
) -> None:
    """Routes, the model and pictures from a bucket, another class, and the one public port."""
    FakeStorage.objects = {
        "models/of/ours/own.pt": checkpoint.read_bytes(),
        "models/of/ours/labels.txt": b"",
        "pictures/a b/büs.jpg": bus,
    }
    environment = {
        "AIP_HEALTH_ROUTE": "/health", "AIP_PREDICT_ROUTE": "/v1/count", "AIP_STORAGE_URI": "gs://models/of/ours",
        "STORAGE_EMULATOR_HOST": storage, "HEADCOUNT_CLASS": "bus", "HEADCOUNT_BUCKETS": "pictures",
        "HEADCOUNT_HOST": "0.0.0.0", "HEADCOUNT_WORKERS": "1",
    }  # fmt: skip
    with running(archive, tmp_path / "log", **environment) as server:
        assert httpx.get(f"{server.url}/health").status_code == 200
        instances = [{"image": {"uri": f"gs://pictures/{name}"}} for name in ("a b/büs.jpg", "none.jpg")]
        answer = httpx.post(f"{server.url}/v1/count", json={"instances": [*instances, inst(bus)]}, timeout=60)
        remote, missing, sent = answer.json()["predictions"]
        assert (remote["count"], remote["model"]["name"]) == (1, "own")
        assert remote == sent
        assert "gs://pictures/none.jpg does not exist" in missing["error"]["message"]
        assert server.process is not None
        public = [one for one in listening([server.process.pid, *server.processes()]) if one[0] != "127.0.0.1"]
        assert public == [("0.0.0.0", server.port)]


def test_models_cannot_be_registered(server: Server, archive: Path) -> None:
    assert server.process is not None
    properties = (run_folder(server) / "torchserve.properties").read_text()
    for address in re.findall(r"^(?:management|inference)_address=(.*)$", properties, re.MULTILINE):
        for url in ("https://127.0.0.1/a.mar", f"file://{archive}", "people"):
            answer = httpx.post(f"{address}/models", params={"url": url, "model_name": "mine"})
            assert answer.status_code in (403, 404, 405), answer.text
    assert {host for host, _ in listening([server.process.pid, *server.processes()])} == {"127.0.0.1"}


# Metrics and logs


def metrics(server: Server) -> dict[str, float]:
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}


def gauge(server: Server, name: str) -> float:
    return metrics(server)[name]


def test_metrics_count(server: Server, bus: bytes) -> None:
    before = metrics(server)
    counts_four(server, bus)
    post(server, b"no picture")
    after = metrics(server)
    grown = {name: value - before.get(name, 0) for name, value in after.items() if value != before.get(name)}
    assert grown['headcount_requests_total{status="200"}'] == 1
    assert grown['headcount_requests_total{status="400"}'] == 1
    assert grown["headcount_people_total"] == 4
    assert grown["headcount_latency_seconds_count"] == 2
    assert grown["headcount_decode_seconds_count"] == 2
    assert grown["headcount_inference_seconds_count"] == 1
    assert 0 < grown["headcount_inference_seconds_sum"] < grown["headcount_latency_seconds_sum"] < 10
    assert (after["headcount_queue"], after["headcount_workers"]) == (0, 2)


def test_logs_name_requests_and_hold_no_pictures(server: Server, bus: bytes) -> None:
    given = post(server, bus, headers={"X-Request-Id": "test-1234"})
    assert given.headers["x-request-id"] == "test-1234"
    bad = post_json(server, [inst(SMALL), {"image": {"b64": "bm90IGJhc2U2NA" * 50 + "?"}}], confidence=0.123)
    hostile = post(server, b"no picture", headers={"X-Request-Id": "a b\t{}"})
    assert eventually(lambda: hostile.headers["x-request-id"] in server.log.read_text(), 2)
    lines = {line.get("request_id"): line for line in server.log_lines()}
    assert lines["test-1234"] == lines["test-1234"] | {"status": 200, "count": "4", "message": "counted"}
    assert lines[bad.headers["x-request-id"]]["status"] == 200
    refusal = lines[hostile.headers["x-request-id"]]
    assert refusal["status"] == 400
    assert "not a picture" in str(refusal["message"])
    text = server.log.read_text()
    for secret in ("bm90IGJhc2U2NA", base64.b64encode(SMALL).decode()[:40], "a b\\t"):
        assert secret not in text
    assert all({"time", "severity", "message"} <= set(line) for line in server.log_lines())
