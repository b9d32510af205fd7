"""The real server, TorchServe included: its answers over REST and gRPC, its logs, and its workers.

Front and launcher are tested without Java in test_front.py, test_connections.py and test_launcher.py, the handler in
test_handler.py, the server's start and end in test_server_end.py.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import random
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from conftest import Server, running
from google.protobuf.message_factory import GetMessageClass
from helpers import encode, eventually, instance
from PIL import Image
from server_harness import (
    NOISE,
    SMALL,
    all_workers,
    counts_four,
    listening,
    metrics,
    post,
    post_json,
    properties,
    refused,
    run_folder,
)
from torchserve_protos import definitions

from headcount import Client, CountError
from headcount.torchserve_grpc import METHOD, PredictionResponse, PredictionsRequest
from serving.contract import COUNT_HEADER
from serving.torchserve import GPU_BATCH

pytestmark = [pytest.mark.slow, pytest.mark.needs("samples")]
MANAGEMENT = "org.pytorch.serve.grpc.management"
STUCK_SECONDS = 5


# Answers


def test_raw_picture(server: Server, bus: bytes) -> None:
    answer = post(server, bus, params={"max_people": 2})
    content = answer.json()
    assert list(content) == ["count", "people", "image", "looks", "model"]
    assert content["count"] == 4, "max_people caps the list, never the count"
    assert content["image"] == {"width": 810, "height": 1080}
    assert list(content["model"]) == ["name", "version"]
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
    instances = [instance(zidane), instance(b"no picture"), instance(bus), {"image": {"b64": "?"}},
                 instance(bus[: len(bus) // 2])]  # fmt: skip
    answer = post_json(server, instances)
    assert (answer.status_code, answer.headers[COUNT_HEADER]) == (200, "6")
    first, second, third, fourth, fifth = answer.json()["predictions"]
    assert (first["count"], third["count"]) == (2, 4)
    for i, bad in ((1, second), (3, fourth), (4, fifth)):
        assert bad["error"]["code"] == 400
        assert f"instances[{i}]" in bad["error"]["message"]


def test_parameters_hold_for_json(server: Server, bus: bytes) -> None:
    left_half = [[0, 0], [0.5, 0], [0.5, 1], [0, 1]]
    whole, half, sure, all_boxes = (
        post_json(server, [instance(bus)], **p).json()["predictions"][0]
        for p in ({}, {"region": left_half}, {"confidence": 0.6, "max_people": 1}, {"iou": 1})
    )
    assert half["people"] == [p for p in whole["people"] if (p["box"][0] + p["box"][2]) / 2 <= 405]
    assert 0 < half["count"] < 4
    assert (sure["count"], len(sure["people"])) == (3, 1)
    assert all_boxes["count"] > 4


def test_annotated_picture(server: Server, bus: bytes) -> None:
    drawn = post(server, bus, headers={"Accept": "image/jpeg"})
    assert (drawn.headers["content-type"], drawn.headers[COUNT_HEADER]) == ("image/jpeg", "4")
    prediction = post_json(server, [instance(bus)], annotate=True).json()["predictions"][0]
    for data in (drawn.content, base64.b64decode(prediction["annotated"]["b64"])):
        picture = Image.open(io.BytesIO(data))
        assert (picture.format, picture.size) == ("JPEG", (810, 1080))
        left, top, _, bottom = prediction["people"][0]["box"]
        red, green, blue = picture.convert("RGB").getpixel((round(left), round((top + bottom) / 2)))  # type: ignore[misc]
        assert green > max(red, blue) + 60, "the left side of a box is drawn there"


@pytest.mark.parametrize(
    ("body", "kind", "says"),
    [
        (SMALL[:100], "image/png", "damaged or cut short"),
        (b'{"instances": []}', "application/json", "instances is empty"),
        (b'{"instances": [{"image": {"uri": "gs://secret/a.jpg"}}]}', "", "'secret' is not one this server may read"),
    ],
)
def test_bad_requests_are_refused(server: Server, bus: bytes, body: bytes, kind: str, says: str) -> None:
    answer = post(server, body, headers={"Content-Type": kind})
    refused(answer, 400, says)
    assert answer.headers["content-type"] == "application/json"
    counts_four(server, bus)


def test_mutated_pictures_cost_no_worker(server: Server, bus: bytes) -> None:
    """test_pictures.py decodes ten thousand such pictures; these pass through the whole server."""
    before = server.workers()
    rng = random.Random(1)
    strip = NOISE.resize((160, 8))  # flat, so that the network is done with it soon
    originals = [encode(strip, kind) for kind in ("JPEG", "PNG", "WEBP", "GIF")]

    def mutated() -> bytes:
        data = bytearray(rng.choice(originals))
        for _ in range(rng.choice((1, 2, 4, 30))):
            data[rng.randrange(len(data))] = rng.randrange(256)
        return bytes(data[: rng.randrange(1, len(data))] if rng.random() < 0.1 else data)

    requests = [[instance(mutated()) for _ in range(100)] for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda instances: post_json(server, instances), requests))
    assert {answer.status_code for answer in answers} == {200}
    codes = Counter(p.get("error", {}).get("code") for answer in answers for p in answer.json()["predictions"])
    assert set(codes) == {None, 400}, "some could be read and some not"
    assert server.workers() == before
    counts_four(server, bus)


def test_grpc(server: Server, bus: bytes) -> None:
    with Client(grpc=f"127.0.0.1:{server.grpc}") as client:
        assert client.count(bus).count == 4
        answer = client.count(bus, confidence=0.6, region=[(0, 0), (1, 0), (1, 1), (0, 1)], annotate=True)
        assert answer.count == 3
        assert Image.open(io.BytesIO(answer.annotated or b"")).size == (810, 1080)
        with pytest.raises(CountError, match="not a picture"):
            client.count(b"no picture")
        assert client.count(bus).count == 4


def test_grpc_takes_json_and_refuses_the_rest(server: Server, bus: bytes, zidane: bytes) -> None:
    told = {"spooled": "../lock", "size": 1, "content_type": "", "query": "", "accept": ""}
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc}") as channel:
        predict = channel.unary_unary(METHOD, PredictionsRequest.SerializeToString, PredictionResponse.FromString)

        def ask(**fields: bytes) -> Any:
            return json.loads(predict(PredictionsRequest(model_name="people", input=fields), timeout=60).prediction)

        answer = ask(data=json.dumps({"instances": [instance(zidane), instance(bus)]}).encode())
        assert [p["count"] for p in answer["predictions"]] == [2, 4]
        for bad in ({"body": bus}, {"body": json.dumps(told).encode()}, {"picture": bus}, {}):
            assert ask(**bad)["error"]["code"] == 400
        assert ask(data=bus)["count"] == 4


def test_where_there_is_a_gpu_requests_are_answered_together(
    archive: Path, tmp_path: Path, bus: bytes, zidane: bytes
) -> None:
    """TorchServe's batches, as they are set up for a GPU; the arithmetic is a CPU's."""
    program = (
        "from serving import capacity, launcher, torchserve; "
        "capacity.gpus = lambda: 1; torchserve.GPU_BATCH_DELAY = 3_600_000; launcher.main()"
    )
    environment = {"HEADCOUNT_WORKERS": "1", "HEADCOUNT_STUCK_SECONDS": "3600"}  # no probes
    server = Server(archive, environment, tmp_path / "log", program=("-c", program)).start()
    asked = [(bus, 4), (zidane, 2), (b"no picture", None), (SMALL, 0)] * (GPU_BATCH // 4)

    def ask(i: int) -> httpx.Response:
        accept = {"Accept": "image/jpeg"} if i < 4 else {}
        return post(server, asked[i][0], headers={"x-request-id": f"request-{i}", **accept})

    try:
        server.wait()
        with ThreadPoolExecutor(len(asked)) as pool:
            early = [pool.submit(ask, i) for i in range(len(asked) - 1)]
            assert eventually(lambda: metrics(server)["headcount_queue"] == len(early))
            assert not any(one.done() for one in early), "fewer wait for others"
            answers = [one.result() for one in [*early, pool.submit(ask, len(asked) - 1)]]
        for i, ((_, count), answer) in enumerate(zip(asked, answers, strict=True)):
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


# Metrics, logs and open ports


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
    assert 0 < grown["headcount_inference_seconds_sum"] < grown["headcount_latency_seconds_sum"]
    assert (after["headcount_queue"], after["headcount_workers"]) == (0, 2)


def test_logs_name_requests_and_hold_no_pictures(server: Server, bus: bytes) -> None:
    given = post(server, bus, headers={"X-Request-Id": "test-1234"})
    assert given.headers["x-request-id"] == "test-1234"
    bad = post_json(server, [instance(SMALL), {"image": {"b64": "bm90IGJhc2U2NA" * 50 + "?"}}], confidence=0.123)
    hostile = post(server, b"no picture", headers={"X-Request-Id": "a b\t{}"})
    assert eventually(lambda: hostile.headers["x-request-id"] in server.log.read_text())
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


def test_models_cannot_be_registered(server: Server, archive: Path) -> None:
    """Neither over HTTP nor over gRPC (TorchServe's CVE-2023-43654)."""
    assert server.process is not None
    settings = properties(server)
    urls = ("https://127.0.0.1/a.mar", f"file://{archive}", "people")
    for name in ("management_address", "inference_address"):
        for url in urls:
            answer = httpx.post(f"{settings[name]}/models", params={"url": url, "model_name": "mine"})
            assert answer.status_code in (403, 404, 405), answer.text
    register, response = (
        GetMessageClass(definitions("management.proto").FindMessageTypeByName(f"{MANAGEMENT}.{name}"))
        for name in ("RegisterModelRequest", "ManagementResponse")
    )
    for kind, code in (("management", grpc.StatusCode.PERMISSION_DENIED), ("inference", grpc.StatusCode.UNIMPLEMENTED)):
        with grpc.insecure_channel(f"127.0.0.1:{settings[f'grpc_{kind}_port']}") as channel:
            call = channel.unary_unary(
                f"/{MANAGEMENT}.ManagementAPIsService/RegisterModel", register.SerializeToString, response.FromString
            )
            for url in urls:
                with pytest.raises(grpc.RpcError) as refusal:
                    call(register(url=url, model_name="mine"), timeout=60)
                assert refusal.value.code() == code
    assert {host for host, _ in listening([server.process.pid, *server.processes()])} == {"127.0.0.1"}


# Workers


@pytest.fixture(scope="module")
def shaken(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose workers are killed and stopped; each test leaves it with two that work."""
    settings = {"HEADCOUNT_QUEUE": "6", "HEADCOUNT_STUCK_SECONDS": str(STUCK_SECONDS), "HEADCOUNT_TIMEOUT": "240"}
    with running(archive, tmp_path_factory.mktemp("shaken") / "log", **settings) as one:
        all_workers(one)
        yield one


def test_busy_is_not_stuck(shaken: Server) -> None:
    """A request may take longer than a stuck worker has, because each of its pictures is a sign of life."""
    many = [instance(encode(Image.new("RGB", (1500, 1500))))] * 25  # small, for a machine that is busy with others
    took = 0.0
    while took <= STUCK_SECONDS:
        many *= 2
        began = time.monotonic()
        with ThreadPoolExecutor(2) as pool:
            long = [pool.submit(post_json, shaken, many, annotate=True) for _ in range(2)]
            while not all(one.done() for one in long):
                assert httpx.get(f"{shaken.url}/ping").status_code == 200
                time.sleep(0.1)
            assert {one.result().status_code for one in long} == {200}
        took = time.monotonic() - began


def test_ping_follows_stopped_workers(shaken: Server, bus: bytes) -> None:
    first, second = stuck = shaken.workers()
    os.kill(first, signal.SIGSTOP)
    try:
        shaken.wait(200)  # TorchServe may give a request to either worker, so none is sent now
        os.kill(second, signal.SIGSTOP)
        shaken.wait(503)
    finally:
        for pid in stuck:
            os.kill(pid, signal.SIGCONT)
    shaken.wait(200)
    assert shaken.workers() == stuck
    counts_four(shaken, bus)


def test_no_request_gets_another_s_answer(shaken: Server, bus: bytes, zidane: bytes) -> None:
    """Files of bodies are used again: while clients leave and workers are killed, none may be used too soon."""
    right = {bus: 4, zidane: 2, SMALL: 0}
    statuses: Counter[int] = Counter()
    stop = threading.Event()

    def leaves(body: bytes, sent: int) -> None:
        head = f"POST /predictions/people HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", shaken.port), timeout=60) as one:
            one.sendall(head.encode() + body[:sent])

    def client(seed: int) -> None:
        rng = random.Random(seed)
        while not stop.is_set():
            body = rng.choice(list(right))
            if rng.random() < 0.2:
                with contextlib.suppress(OSError):
                    leaves(body, rng.choice((rng.randrange(len(body)), len(body))))
                continue
            answer = post(shaken, body)
            statuses[answer.status_code] += 1
            assert answer.status_code in (200, 429, 503)
            if answer.status_code == 200:
                assert answer.json()["count"] == right[body]

    def kill_a_busy_worker() -> None:
        """A request that it was answering gets 503."""
        before = statuses[503]
        while statuses[503] == before:
            with contextlib.suppress(ProcessLookupError, IndexError):
                os.kill(shaken.workers()[0], signal.SIGKILL)
            assert eventually(lambda: statuses[503] > before or metrics(shaken)["headcount_workers"] > 1)

    with ThreadPoolExecutor(8) as pool:
        clients = [pool.submit(client, seed) for seed in range(8)]
        try:
            assert eventually(lambda: statuses[200] > 20)
            kill_a_busy_worker()
            counted = statuses[200]
            assert eventually(lambda: statuses[200] > counted + 20 and statuses[429])
        finally:
            stop.set()
        for one in clients:
            one.result()
    all_workers(shaken)
    counts_four(shaken, bus)
    assert eventually(lambda: not any((run_folder(shaken) / "spool").iterdir()))


def test_killed_workers_come_back(shaken: Server, bus: bytes) -> None:
    dead = shaken.workers()
    assert len(dead) == 2
    for pid in dead:
        os.kill(pid, signal.SIGKILL)
    shaken.wait(503)
    refused(post(shaken, bus), 503, "worker")
    all_workers(shaken)
    counts_four(shaken, bus)
    assert not set(dead) & set(shaken.workers())
