"""The front over real sockets, with short limits and a stand-in for TorchServe behind it."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import io
import json
import logging
import os
import re
import socket
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from front_harness import HEADER, Answered, Rig, identity, post_head, running, until
from prometheus_client.parser import text_string_to_metric_families

from serving import connections, spool

pytestmark = pytest.mark.anyio
Start = Callable[..., Awaitable[Rig]]


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, bool]]:
    return "asyncio", {"use_uvloop": True}


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    """Starts a front with these settings."""
    async with contextlib.AsyncExitStack() as stack:
        yield lambda **settings: stack.enter_async_context(running(tmp_path, **settings))


@pytest.fixture
async def rig(start: Start) -> Rig:
    return await start()


def refused(answer: httpx.Response, status: int, says: str) -> None:
    """The answer is the error that the contract describes."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    error_is(answer.content, status, says)


def error_is(body: bytes, status: int, says: str) -> None:
    error = json.loads(body)["error"]
    assert error["code"] == status
    assert re.fullmatch("[A-Z_]+", error["status"])
    assert error["status"] != "UNKNOWN"
    assert says in error["message"]


class _Said(io.BytesIO):
    """What a server said on a connection, for http.client to read one answer after the other from."""

    def makefile(self, _: str) -> _Said:
        return self

    def close(self) -> None:
        pass


def answers(said: bytes) -> list[tuple[int, bytes]]:
    """Status and body of each answer in what a server said."""
    found, file = [], _Said(said)
    while file.tell() < len(said):
        one = http.client.HTTPResponse(file)  # type: ignore[arg-type]
        one.begin()
        found.append((one.status, one.read()))
    return found


def always(answer: Answered) -> Callable[[dict[str, Any], bytes], Answered]:
    return lambda told, body: answer


# What passes through


async def test_a_body_arrives_whole_with_what_was_said_of_it(rig: Rig) -> None:
    body = bytes(range(256)) * 2000
    headers = {"Content-Type": "image/x", "Accept": "image/jpeg", "X-Request-Id": "one-1"}
    answer = await rig.post(body, headers=headers, params={"confidence": "0.5"})
    assert (answer.status_code, answer.content) == (200, identity(body))
    (told,) = rig.torchserve.asked
    assert told == told | {
        "size": len(body), "content_type": "image/x", "accept": "image/jpeg", "query": "confidence=0.5",
        "request_id": "one-1",
    }  # fmt: skip
    assert (answer.headers["x-request-id"], answer.headers[HEADER]) == ("one-1", "1")
    assert answer.headers["server-timing"] == "decode;dur=2, inference;dur=3"


async def test_a_body_in_chunks_is_put_together(rig: Rig) -> None:
    async def parts() -> AsyncIterator[bytes]:
        for i in range(20):
            yield bytes([i]) * 30_000

    body = b"".join([part async for part in parts()])
    assert (await rig.post(parts())).content == identity(body)


async def test_a_worker_s_answer_is_passed_on_as_it_is(rig: Rig) -> None:
    headers = {"content-type": "image/jpeg", HEADER: "7", "x-secret": "not passed on"}
    rig.torchserve.decide = always(Answered(200, b"jpeg", headers))
    answer = await rig.post()
    assert (answer.headers["content-type"], answer.headers[HEADER], answer.content) == ("image/jpeg", "7", b"jpeg")
    assert "x-secret" not in answer.headers
    error = b'{"error": {"code": 400, "status": "INVALID_ARGUMENT", "message": "not a picture"}}'
    rig.torchserve.decide = always(Answered(400, error))
    refused(await rig.post(), 400, "not a picture")
    rig.torchserve.decide = always(Answered(503, error.replace(b"400", b"503")))
    later = await rig.post()
    refused(later, 503, "not a picture")
    assert int(later.headers["retry-after"]) >= 1


async def test_a_request_id_that_is_no_id_is_replaced(rig: Rig) -> None:
    for bad in ("a b", "{}", "x" * 65, ""):
        given = (await rig.post(headers={"X-Request-Id": bad})).headers["x-request-id"]
        assert re.fullmatch("[0-9a-f]{16}", given)


async def test_routes(start: Start) -> None:
    rig = await start(predict_route="/v1/count", health_route="/health")
    async with rig.client() as client:
        assert (await client.post("/v1/count", content=b"a")).content == identity(b"a")
        assert (await client.post("/predictions/people", content=b"b")).content == identity(b"b")
        assert (await client.get("/health")).json() == {"status": "Healthy"}
        refused(await client.get("/models"), 404, "POST a picture to /v1/count")
        refused(await client.get("/v1/count"), 405, "takes POST")
        head = await client.head("/health")
        assert (head.status_code, head.content, head.headers["content-length"]) == (200, b"", "20")


async def test_files_are_used_again_and_never_mixed(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "REUSED_SECONDS", 0.2)
    bodies = [bytes([65 + i]) * size for i, size in enumerate((10, 500_000, 3, 0, 400_000, 1))]
    for body in bodies:  # a short one after a long one is not mixed with its rest
        assert (await rig.post(body)).content == identity(body)
    assert len({told["spooled"] for told in rig.torchserve.asked}) == 1
    files = list(rig.torchserve.folder.spool.iterdir())
    assert len(files) == 1
    await until(lambda: not any(rig.torchserve.folder.spool.iterdir()))


async def test_many_at_once_get_their_own_answers(rig: Rig) -> None:
    async with rig.client() as client:

        async def ask(i: int) -> None:
            body = str(i).encode() * (1 + i * 997 % 40_000)
            assert (await client.post("/predictions/people", content=body)).content == identity(body)

        await asyncio.gather(*(ask(i) for i in range(60)))
    assert rig.front.spool.used == 0
    assert (rig.front.open, rig.front.in_flight) == (0, 0)


# Limits of a request


async def test_a_body_over_the_limit_is_refused(start: Start) -> None:
    rig = await start(request_bytes=1000)
    refused(await rig.post(bytes(1001)), 413, "larger than 0.001 MB")

    async def parts() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield bytes(100)

    refused(await rig.post(parts()), 413, "HEADCOUNT_MAX_REQUEST_BYTES")
    assert rig.torchserve.asked == []
    assert (await rig.post(bytes(1000))).content == identity(bytes(1000))


async def test_a_body_that_does_not_end_is_read_to_four_times_the_limit(start: Start) -> None:
    rig = await start(request_bytes=1000)
    async with await rig.send(post_head("Transfer-Encoding: chunked")) as connection:
        writing = asyncio.create_task(flood(connection, b"64\r\n" + bytes(100) + b"\r\n"))
        ((status, body),) = answers(await connection.rest())
        writing.cancel()
    assert status == 413
    error_is(body, 413, "larger than")


async def flood(connection: Any, data: bytes, pause: float = 0) -> None:
    while True:
        await connection.send(data)
        await asyncio.sleep(pause)


async def test_a_client_that_asks_first_is_told_before_it_sends(start: Start) -> None:
    rig = await start(request_bytes=1000)
    ask = post_head("Expect: 100-continue", "Connection: close", "Content-Length: {}").decode()
    ((status, _),) = answers(await rig.talk(ask.format(1001).encode()))
    assert status == 413, "and not 100 before it"
    async with await rig.send(ask.format(1000).encode()) as connection:
        assert await connection.to(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        await connection.send(bytes(1000))
        assert answers(await connection.rest()) == [(200, identity(bytes(1000)))]


async def test_a_body_that_does_not_arrive_in_time_is_refused(start: Start) -> None:
    rig = await start(body_seconds=0.1)
    ((status, body),) = answers(await rig.talk(post_head("Content-Length: 10") + b"12345"))
    assert status == 408
    error_is(body, 408, "within 0.1 s")
    assert rig.torchserve.asked == []
    assert not any(rig.torchserve.folder.spool.iterdir())
    assert rig.front.spool.used == 0


async def test_slow_uploads_hold_no_place_in_the_queue(start: Start) -> None:
    rig = await start(queue=1)
    for _ in range(20):
        await rig.send(post_head("Content-Length: 10") + b"12345")
    await until(lambda: rig.front.open == 20)
    assert (await rig.post()).status_code == 200


async def test_a_full_queue_says_when_to_come_back(start: Start) -> None:
    rig = await start(queue=2)
    rig.torchserve.hold.clear()
    waiting = [asyncio.create_task(rig.post(bytes([i]))) for i in range(2)]
    await until(lambda: rig.front.in_flight == 2)
    assert (await rig.metrics())["headcount_queue"] == 2
    busy = await rig.post()
    refused(busy, 429, "2 requests wait")
    assert int(busy.headers["retry-after"]) >= 1
    rig.torchserve.hold.set()
    for i, one in enumerate(waiting):
        assert (await one).content == identity(bytes([i]))
    assert (await rig.post()).status_code == 200


async def test_a_full_spool_says_when_to_come_back(start: Start) -> None:
    rig = await start(request_bytes=1000, spool_bytes=2500)
    rig.torchserve.hold.clear()
    waiting = [asyncio.create_task(rig.post(bytes(1000))) for _ in range(2)]
    await until(lambda: rig.front.in_flight == 2)
    full = await rig.post(bytes(501))
    refused(full, 429, "too many pictures")
    assert int(full.headers["retry-after"]) >= 1
    fits = asyncio.create_task(rig.post(bytes(500)))
    await until(lambda: rig.front.in_flight == 3)
    rig.torchserve.hold.set()
    assert {(await one).status_code for one in (*waiting, fits)} == {200}
    assert rig.front.spool.used == 0


async def test_slow_uploads_give_way_when_the_spool_is_full(start: Start) -> None:
    rig = await start(request_bytes=1000, spool_bytes=3000, slow_seconds=0)
    slow = [await rig.send(post_head("Content-Length: 1000") + bytes(999)) for _ in range(3)]
    await until(lambda: rig.front.spool.used == 2997)
    assert (await rig.post(bytes(1000))).status_code == 200, "nobody is locked out"
    ((status, body),) = answers(await slow[0].rest())
    error_is(body, 408, "others needed the room")
    assert status == 408
    for one in slow[1:]:  # there was room again, so they were left alone
        await one.send(b"1")
        assert await one.to(b"\r\n") == b"HTTP/1.1 200 OK\r\n"
    assert rig.front.spool.used == 0


async def test_uploads_that_began_a_moment_ago_do_not_give_way(start: Start) -> None:
    rig = await start(request_bytes=1000, spool_bytes=1000, slow_seconds=3600)
    async with await rig.send(post_head("Content-Length: 1000", "Connection: close") + bytes(999)) as first:
        await until(lambda: rig.front.spool.used == 999)
        refused(await rig.post(b"12"), 429, "too many pictures")
        await first.send(b"1")
        assert [status for status, _ in answers(await first.rest())] == [200]


async def test_a_request_that_takes_too_long_is_given_up(start: Start) -> None:
    rig = await start(answer_seconds=0.1)
    rig.torchserve.hold.clear()
    refused(await rig.post(), 504, "no answer within 0.1 s")
    assert (rig.front.in_flight, rig.front.spool.used) == (0, 0)
    rig.torchserve.hold.set()
    assert (await rig.metrics())['headcount_requests_total{status="504"}'] == 1


# Failures


async def test_a_client_that_leaves_half_way_leaves_nothing(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "headcount")
    connection = await rig.send(post_head("Content-Length: 900", "X-Request-Id: left") + bytes(300))
    await until(lambda: rig.front.spool.used == 300)
    connection.close()
    await until(lambda: rig.front.open == 0)
    assert rig.front.spool.used == 0
    assert not any(rig.torchserve.folder.spool.iterdir())
    assert (await rig.metrics())['headcount_requests_total{status="499"}'] == 1
    (line,) = [record for record in caplog.records if record.name == "headcount"]
    assert line.getMessage() == "the client went away"
    assert line.__dict__["fields"] | {"request_id": "left", "status": 499} == line.__dict__["fields"]


async def test_without_a_worker_it_says_when_to_come_back(rig: Rig) -> None:
    assert (await rig.get("/ping")).status_code == 200
    rig.end_worker()
    answer = await rig.post()
    refused(answer, 503, "no worker is ready")
    assert int(answer.headers["retry-after"]) >= 1
    ping = await rig.get("/ping")
    assert (ping.status_code, ping.json()) == (503, {"status": "Unhealthy"})
    assert (await rig.metrics())["headcount_workers"] == 0


async def test_a_worker_without_a_sign_of_life_is_no_healthy_one(start: Start) -> None:
    rig = await start(stuck_seconds=3600)
    assert (await rig.get("/ping")).status_code == 200
    os.utime(rig.worker._alive, (0, 0))
    assert (await rig.get("/ping")).status_code == 503
    rig.worker.sign_of_life()
    assert (await rig.get("/ping")).status_code == 200


async def test_an_idle_worker_is_asked_for_a_sign_of_life(start: Start) -> None:
    rig = await start(stuck_seconds=3600)
    await rig.front.probe(b"tiny")
    assert rig.torchserve.asked == [], "it gave one a moment ago"
    os.utime(rig.worker._alive, (0, 0))
    await rig.front.probe(b"tiny")
    assert [told["request_id"] for told in rig.torchserve.asked] == ["probe"]
    assert rig.front.spool.used == 0


async def test_torchserve_s_own_words_are_not_passed_on(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    for status in (503, 507, 500):
        rig.torchserve.decide = always(Answered(status, b'{"code": 1, "type": "Java"}'))
        answer = await rig.post()
        refused(answer, 503, "no worker could answer")
        assert int(answer.headers["retry-after"]) >= 1
    rig.front.upstream.close()
    monkeypatch.setattr(rig.front.upstream, "port", 1)
    refused(await rig.post(), 503, "no worker is available")


async def test_a_failure_of_the_server_itself_is_a_500(rig: Rig) -> None:
    rig.torchserve.folder.spool.rmdir()
    refused(await rig.post(), 500, "its log says why")
    assert (rig.front.open, rig.front.spool.used) == (0, 0)


# Leaving


async def test_who_leaves_says_so_first_and_refuses_later(rig: Rig) -> None:
    async with rig.client() as client:
        before = await client.post("/predictions/people", content=b"before")
        assert "connection" not in before.headers
        rig.front.leaving = True
        ping = await client.get("/ping")
        assert (ping.status_code, ping.json()) == (503, {"status": "Draining"})
        late = await client.post("/predictions/people", content=b"late")
        assert late.content == identity(b"late"), "a load balancer needs a while"
        assert late.headers["connection"] == "close"
        rig.torchserve.hold.clear()
        waiting = asyncio.create_task(rig.post(b"waiting"))
        uploading = await rig.send(post_head("Content-Length: 2") + b"1")
        await until(lambda: rig.front.open == 2 and rig.front.in_flight == 1)
        rig.front.draining = True
        refusal = await client.post("/predictions/people", content=b"too late")
        refused(refusal, 503, "shutting down")
        assert int(refusal.headers["retry-after"]) >= 1
        rig.torchserve.hold.set()
        assert (await waiting).content == identity(b"waiting"), "who was taken is answered"
        await uploading.send(b"2")
        assert answers(await uploading.rest()) == [(200, identity(b"12"))]


# HTTP at its edges

CHUNKED = b"5\r\nhello\r\n0\r\n\r\n"
SMUGGLED = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.mark.parametrize(
    "request_",
    [
        post_head("Content-Length: 5", "Content-Length: 6") + b"hello!",
        post_head("Content-Length: 5", "Content-Length: 5") + b"hello",
        post_head("Content-Length: 5, 6") + b"hello!",
        post_head("Content-Length: +5") + b"hello",
        post_head("Content-Length: -1"),
        post_head("Content-Length: 99999999999999999999999"),
        post_head("Content-Length: 5", "Transfer-Encoding: chunked") + CHUNKED,
        post_head("Transfer-Encoding: chunked", "Content-Length: 5") + CHUNKED,
        post_head("Transfer-Encoding: chunked, identity") + CHUNKED,
        post_head("Transfer-Encoding: chunked") + b"-5\r\nhello\r\n0\r\n\r\n",
        post_head("Transfer-Encoding: chunked") + b"ffffffffffffffffff\r\nhello",
        post_head("Bad Name: 1") + b"",
        post_head("Folded: 1\r\n 2"),
        post_head("Null: \0"),
        b"CONNECT x:443 HTTP/1.1\r\nHost: x:443\r\n\r\n",
        b"POST\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS, as https:// to this port begins
    ],
    ids=lambda request_: request_[request_.find(b"x\r\n") + 3 :][:40].decode("latin-1").partition("\r\n\r\n")[0],
)
async def test_a_request_with_two_readings_is_refused(rig: Rig, request_: bytes) -> None:
    """What one server takes for a body, the next may take for a request (RFC 9112, section 6.3)."""
    ((status, body),) = answers(await rig.talk(request_ + SMUGGLED))
    assert status == 400
    error_is(body, 400, "HTTP/1.1")
    assert rig.torchserve.asked == []
    await until(lambda: rig.front.open == 0)
    assert rig.front.spool.used == 0


@pytest.mark.parametrize(
    "request_",
    [
        post_head("Transfer-Encoding: chunked") + b"5;name=value;other=\"quoted\"\r\nhello\r\n0;last\r\n\r\n",
        post_head("Transfer-Encoding: chunked") + b"2\r\nhe\r\n003\r\nllo\r\n0\r\nTrailer: 1\r\n\r\n",
        post_head("TRANSFER-ENCODING: Chunked") + CHUNKED,
        post_head("Content-Length: 005") + b"hello",
        post_head("Content-Length: 5", "Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: A")
        + b"hello",  # Java's own client and curl --http2 ask so
        post_head("Connection: upgrade", "Upgrade: h2c", "Transfer-Encoding: chunked") + CHUNKED,
    ],
    ids=["extensions", "trailer", "capitals", "zeros", "upgrade", "upgrade in chunks"],
)  # fmt: skip
async def test_a_request_with_one_reading_is_answered(rig: Rig, request_: bytes) -> None:
    async with await rig.send(request_) as connection:
        assert await connection.to(b"\r\n") == b"HTTP/1.1 200 OK\r\n"
        assert (await connection.to(b"}")).endswith(identity(b"hello"))
        await connection.send(post_head("Content-Length: 1", "Connection: close") + b"2")
        assert answers(await connection.rest())[-1] == (200, identity(b"2")), "and so is the next on the connection"


async def test_requests_sent_before_the_answer_are_answered_in_order(rig: Rig) -> None:
    one = post_head("Content-Length: 300") + b"1" * 300
    two = post_head("Transfer-Encoding: chunked") + CHUNKED
    last = post_head("Content-Length: 5", "Connection: close") + b"three"
    said = await rig.talk(one + two + b"GET /nothing HTTP/1.1\r\nHost: x\r\n\r\n" + last)
    bodies = [body for _, body in answers(said)]
    assert [status for status, _ in answers(said)] == [200, 200, 404, 200]
    assert [bodies[0], bodies[1], bodies[3]] == [identity(b"1" * 300), identity(b"hello"), identity(b"three")]


async def test_behind_a_refused_request_nothing_is_answered(start: Start) -> None:
    """A refused body may hold bytes that look like a request: the connection is closed instead."""
    rig = await start(request_bytes=100)
    said = await rig.talk(post_head("Content-Length: 101") + bytes(101) + SMUGGLED)
    assert [status for status, _ in answers(said)] == [413]


async def test_behind_a_busy_answer_the_next_request_is_answered(start: Start) -> None:
    rig = await start()
    rig.end_worker()
    said = await rig.talk(post_head("Content-Length: 5") + b"hello" + post_head("Connection: close"))
    assert [status for status, _ in answers(said)] == [503, 503]


async def test_what_is_wrong_behind_a_good_request_does_not_hurt_it(rig: Rig) -> None:
    rig.torchserve.hold.clear()
    async with await rig.send(post_head("Content-Length: 4") + b"good" + b"no request\r\n\r\n") as connection:
        await until(lambda: rig.front.in_flight == 1)
        await connection.send(SMUGGLED)
        rig.torchserve.hold.set()
        assert answers(await connection.rest()) == [(200, identity(b"good"))]


async def test_http_1_0(rig: Rig) -> None:
    assert answers(await rig.talk(post_head("Content-Length: 3", version="1.0") + b"old")) == [(200, identity(b"old"))]
    ((status, _),) = answers(await rig.talk(b"GET /ping HTTP/1.0\r\n\r\n"))
    assert status == 200


async def test_head_has_headers_and_no_body(rig: Rig) -> None:
    request_ = b"HEAD /predictions/people HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    head, _, body = (await rig.talk(request_)).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 405")
    assert re.search(rb"content-length: [1-9]", head)
    assert body == b""


@pytest.mark.parametrize(
    "head",
    [
        post_head("Big: " + "a" * 20_000),
        post_head(*["Small: 1"] * 2000),
        b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\n\r\n",
        post_head("Big: " + "a" * 20_000).removesuffix(b"\r\n\r\n"),
        post_head("Big: " + "a" * 1_000_000),
    ],
    ids=["one header", "many", "path", "no end", "huge"],
)
async def test_a_head_has_a_limit_of_size(rig: Rig, head: bytes) -> None:
    ((status, body),) = answers(await rig.talk(head))
    assert status == 431
    error_is(body, 431, "more than 16384 bytes")
    assert (await rig.get("/ping")).status_code == 200


@pytest.mark.parametrize(
    "endless", [b"Trailer: 1\r\n", b"0" * 100, b"Trailer: " + b"a" * 1000], ids=["trailers", "size", "trailer"]
)
async def test_what_is_beside_a_body_has_a_limit_of_size(rig: Rig, endless: bytes) -> None:
    start = b"5\r\nhello\r\n" + (b"" if endless.startswith(b"0") else b"0\r\n")
    async with await rig.send(post_head("Transfer-Encoding: chunked") + start) as connection:
        writing = asyncio.create_task(flood(connection, endless))
        ((status, body),) = answers(await connection.rest())
        writing.cancel()
    assert status in (400, 431)
    error_is(body, status, "")
    await until(lambda: rig.front.open == 0)


async def test_a_trailer_is_no_header(rig: Rig) -> None:
    said = await rig.talk(
        post_head("Transfer-Encoding: chunked", "X-Request-Id: head", "Connection: close")
        + b"5\r\nhello\r\n0\r\nX-Request-Id: trailer\r\nContent-Type: evil\r\n\r\n"
    )
    assert answers(said) == [(200, identity(b"hello"))]
    assert (rig.torchserve.asked[0]["request_id"], rig.torchserve.asked[0]["content_type"]) == ("head", "")


async def test_a_head_within_the_limit_is_taken_in_any_pieces(start: Start) -> None:
    rig = await start(head_bytes=1000)
    head = post_head("Content-Length: 2", "Connection: close", "Big: " + "a" * 1000)
    too_long = len(head) - 1000
    head = head.replace(b"a" * too_long, b"", 1)
    assert len(head) == 1000
    async with await rig.send(head[:500]) as connection:
        await connection.send(head[500:] + b"ok")
        assert answers(await connection.rest()) == [(200, identity(b"ok"))]
    assert answers(await rig.talk(head + b"ok")) == [(200, identity(b"ok"))]
    ((status, _),) = answers(await rig.talk(head.replace(b"aa", b"aaa", 1) + b"ok"))
    assert status == 431


async def test_a_head_has_a_limit_of_time(start: Start) -> None:
    rig = await start(head_seconds=0.1)
    async with await rig.send(b"POST /predictions/people HTTP/1.1\r\n") as connection:
        trickle = asyncio.create_task(flood(connection, b"A: 1\r\n", 0.01))
        ((status, body),) = answers(await connection.rest())
        trickle.cancel()
    assert status == 408
    error_is(body, 408, "headers did not arrive within 0.1 s")
    assert await rig.talk(b"") == b"", "and who says nothing is not answered"


async def test_a_second_head_on_a_connection_has_a_limit_of_time_too(start: Start) -> None:
    rig = await start(head_seconds=0.1)
    rig.torchserve.hold.clear()
    async with await rig.send(post_head("Content-Length: 3") + b"one" + b"POST /pre") as connection:
        await until(lambda: rig.front.in_flight == 1)
        await asyncio.sleep(0.2)
        rig.torchserve.hold.set()
        assert await connection.to(b"}"), "the first answer is not cut off"
        await connection.send(b"dictions")
        assert [status for status, _ in answers(await connection.rest())] == [408]


async def test_the_rest_of_a_body_that_was_answered_early_has_a_limit_of_time(start: Start) -> None:
    rig = await start(body_seconds=0.1)
    rig.end_worker()
    async with await rig.send(post_head("Content-Length: 1000")) as connection:
        trickle = asyncio.create_task(flood(connection, b"1", 0.01))
        assert [status for status, _ in answers(await connection.rest())] == [503]
        trickle.cancel()


async def test_a_client_that_does_not_read_its_answer_is_given_up(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "IDLE_SECONDS", 0.1)
    rig.torchserve.decide = always(Answered(200, bytes(30_000_000)))
    with socket.create_connection(("127.0.0.1", rig.port)) as client:
        client.sendall(post_head("Content-Length: 1") + b"1")
        await until(lambda: rig.front.open == 0 and bool(rig.torchserve.asked))
        await until(lambda: not rig.server.server_state.connections)


# Metrics


async def test_metrics_are_what_prometheus_reads(rig: Rig) -> None:
    await rig.post(b"one")
    rig.torchserve.decide = always(Answered(400, b'{"error": {"message": "bad"}}', {"server-timing": "decode;dur=1"}))
    await rig.post(b"two")
    answer = await rig.get("/metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4"
    families = {family.name: family for family in text_string_to_metric_families(answer.text)}
    assert {name: family.type for name, family in families.items() if not name.endswith("_created")} == {
        "headcount_requests": "counter", "headcount_people": "counter", "headcount_queue": "gauge",
        "headcount_workers": "gauge", "headcount_latency_seconds": "histogram",
        "headcount_decode_seconds": "histogram", "headcount_inference_seconds": "histogram",
    }  # fmt: skip
    assert all(family.documentation for family in families.values())
    values = {(s.name, *s.labels.values()): s.value for family in families.values() for s in family.samples}
    assert values["headcount_requests_total", "200"] == values["headcount_requests_total", "400"] == 1
    assert values[("headcount_people_total",)] == 1
    assert values[("headcount_latency_seconds_count",)] == values["headcount_latency_seconds_bucket", "+Inf"] == 2
    assert values[("headcount_decode_seconds_sum",)] == pytest.approx(0.003)
    assert values[("headcount_inference_seconds_count",)] == 1
    assert (values[("headcount_queue",)], values[("headcount_workers",)]) == (0, 1)


@pytest.mark.needs("promtool")
async def test_promtool_finds_nothing_to_mend(rig: Rig) -> None:
    await rig.post(b"one")
    text = (await rig.get("/metrics")).content
    done = subprocess.run(["promtool", "check", "metrics"], input=text, check=False, capture_output=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, b"")
