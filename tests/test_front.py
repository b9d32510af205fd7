"""The front over real sockets, with short limits and a stand-in for TorchServe behind it.

HTTP at its edges is in test_connections.py.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from front_harness import (
    HEADER,
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
    refused,
    rig,
    running,
    start,
    until,
)
from prometheus_client.parser import text_string_to_metric_families

from serving import spool
from serving.page import page

pytestmark = pytest.mark.anyio
__all__ = ["anyio_backend", "rig", "start"]  # fixtures


# Requests that pass through


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
    monkeypatch.setattr(spool, "REUSED_SECONDS", 600)
    bodies = [bytes([65 + i]) * size for i, size in enumerate((10, 500_000, 3, 0, 400_000, 1))]
    for body in bodies:  # a short one after a long one is not mixed with its rest
        assert (await rig.post(body)).content == identity(body)
    assert len({told["spooled"] for told in rig.torchserve.asked}) == 1
    assert len(list(rig.torchserve.folder.spool.iterdir())) == 1


async def test_a_file_that_is_not_used_again_is_removed(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "REUSED_SECONDS", 0.05)
    assert (await rig.post(b"a body")).content == identity(b"a body")
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


# The page


async def test_the_page_is_at_the_root(tmp_path: Path) -> None:
    async with running(tmp_path, request_bytes=12345) as rig, rig.client() as client:
        answer = await client.get("/")
        assert answer.status_code == 200
        expected, kind, headers = page(12345, "this server")
        assert answer.content == expected
        assert answer.headers["content-type"] == kind
        assert headers.items() <= answer.headers.items()
        head = await client.head("/")
        assert (head.status_code, head.content) == (200, b"")
        posted = await client.post("/")
        assert (posted.status_code, posted.headers["allow"]) == (405, "GET, HEAD")


async def test_the_page_can_be_switched_off(tmp_path: Path) -> None:
    async with running(tmp_path, page=False) as rig:
        answer = await rig.get("/")
        assert answer.status_code == 404
        assert "there is nothing at /" in answer.json()["error"]["message"]
        assert (await rig.get("/openapi.json")).status_code == 200
