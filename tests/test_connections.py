"""The connections of clients to the front: HTTP at its edges, and limits of size and time."""

from __future__ import annotations

import asyncio
import re
import socket

import pytest
from front_harness import (
    Answered,
    Rig,
    Start,
    always,
    answers,
    anyio_backend,
    error_is,
    flood,
    identity,
    post_head,
    rig,
    start,
    until,
)

from serving import connections

pytestmark = pytest.mark.anyio
__all__ = ["anyio_backend", "rig", "start"]  # fixtures


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
