"""`headcount web`: the page before any counter, for this machine's browser alone."""

from __future__ import annotations

import contextlib
import io
import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from browser import add, opened
from helpers import encode
from PIL import Image
from playwright.sync_api import Browser, expect
from pytest_httpserver import HTTPServer
from werkzeug import Request, Response

from headcount import Person
from headcount.counters import Answer, CountError
from headcount.endpoint import Address, Endpoint
from headcount.web_command import Web
from serving.contract import Limits, Parameters
from serving.page import page

ROUTE = "/predictions/people"


class Counting:
    """A counter that keeps what it is given, and finds one person."""

    parallel = 2

    def __init__(self) -> None:
        self.asked: list[tuple[bytes, Parameters]] = []

    def count(self, data: bytes, parameters: Parameters) -> Answer:
        self.asked.append((data, parameters))
        if data == b"broken":
            raise CountError("the endpoint is asleep; wake it")
        width, height = Image.open(io.BytesIO(data)).size
        annotated = b"drawn" if parameters.annotate else None
        return Answer(
            1, [Person((1, 2, 30, 40), 0.8)], width, height, {"name": "m", "version": "1"}, annotated=annotated
        )

    def close(self) -> None: ...


@pytest.fixture
def web() -> Iterator[Web]:
    with served(Web(Counting(), "stack dev's <endpoint>")) as server:
        yield server


@contextlib.contextmanager
def served(server: Web) -> Iterator[Web]:
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    with server:
        yield server
        server.shutdown()
    thread.join()


PICTURE = encode(Image.new("RGB", (64, 48)))


def test_it_is_the_page_and_says_where_pictures_go(web: Web) -> None:
    answer = httpx.get(web.url)
    body, kind, headers = page(Limits.request_bytes, "stack dev's <endpoint>")
    assert (answer.content, answer.headers["content-type"]) == (body, kind)
    assert headers.items() <= answer.headers.items()
    assert b"&lt;endpoint&gt;" in body
    head = httpx.head(web.url)
    assert (head.status_code, head.content, head.headers["content-length"]) == (200, b"", str(len(body)))


def test_pictures_and_parameters_reach_the_counter(web: Web) -> None:
    assert isinstance(web.counter, Counting)
    asked = {"detail": "full", "candidates": "0.05"}
    answer = httpx.post(web.url + ROUTE, content=PICTURE, params=asked)
    assert answer.json() == {
        "count": 1, "people": [{"box": [1, 2, 30, 40], "confidence": 0.8}], "image": {"width": 64, "height": 48},
        "looks": 1, "model": {"name": "m", "version": "1"},
    }  # fmt: skip
    assert web.counter.asked == [(PICTURE, Parameters(detail="full", candidates=0.05))]
    drawn = httpx.post(web.url + ROUTE, content=PICTURE, params={"annotate": "true"}).json()
    assert drawn["annotated"] == {"b64": "ZHJhd24="}


@pytest.mark.parametrize(
    ("method", "path", "content", "code", "said"),
    [
        ("GET", "/other", b"", 404, "there is nothing at /other"),
        ("POST", "/", PICTURE, 404, "POST a picture to /predictions/people"),
        ("POST", f"{ROUTE}?detail=close", PICTURE, 400, "detail is 'close'; it must be fast, full or auto"),
        ("POST", ROUTE, b"broken", 502, "the endpoint is asleep; wake it"),
        ("PUT", ROUTE, PICTURE, 501, "Unsupported method"),
    ],
)
def test_errors_are_json_in_words(web: Web, method: str, path: str, content: bytes, code: int, said: str) -> None:
    answer = httpx.request(method, web.url + path, content=content)
    assert answer.status_code == code
    assert said in answer.json()["error"]["message"]
    assert answer.json()["error"]["code"] == code
    assert httpx.get(web.url).status_code == 200


def test_a_body_has_a_length_and_a_limit(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Limits, "request_bytes", 1000)
    for content, code, said in ((bytes(1001), 413, "at most 1000 are taken"), (iter([b"x"]), 411, "no Content-Length")):
        answer = httpx.post(web.url + ROUTE, content=content)
        assert answer.status_code == code
        assert said in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("headers", "said"),
    [
        ({"Host": "evil.example"}, "no other name leads to it"),
        ({"Origin": "https://evil.example"}, "a page of https://evil.example may not count here"),
        ({"Origin": "null"}, "a page of null may not count here"),
        ({"Origin": "http://127.0.0.1:1"}, "may not count here"),
    ],
)
def test_other_pages_in_the_browser_cannot_count(web: Web, headers: dict[str, str], said: str) -> None:
    """Neither by sending a form here, nor by a name of theirs that leads here."""
    assert isinstance(web.counter, Counting)
    answer = httpx.post(web.url + ROUTE, content=PICTURE, headers=headers)
    assert answer.status_code == 403
    assert said in answer.json()["error"]["message"]
    assert web.counter.asked == []
    assert httpx.post(web.url + ROUTE, content=PICTURE, headers={"Origin": web.url}).status_code == 200


def test_only_this_machine_reaches_it(web: Web) -> None:
    assert web.server_address[0] == "127.0.0.1"


@contextlib.contextmanager
def run(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "headcount.cli", "web", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_serves_until_it_is_stopped(httpserver: HTTPServer, number: int) -> None:
    found = Answer(3, [], 64, 48, {"name": "m", "version": "1"}).as_json()
    httpserver.expect_request(ROUTE, method="POST").respond_with_json(found)
    with run("--url", httpserver.url_for("/")) as process:
        assert process.stdout
        line = process.stdout.readline()
        said = re.fullmatch(r"Headcount counts at (http://127\.0\.0\.1:\d+), on (.*)\. Ctrl-C stops it\.\n", line)
        assert said
        assert said[2] == httpserver.url_for("/")
        assert httpx.post(said[1] + ROUTE, content=PICTURE).json()["count"] == 3
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "", "")


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--url", "x", "--stack", "dev"], 2, "give one of them"),
        (["--url", "x"], 2, "'x' is not a server's URL"),
        (["--endpoint", "x"], 2, "'x' is not an endpoint"),
    ],
)
def test_what_it_cannot_serve_is_said(arguments: list[str], code: int, said: str) -> None:
    with run(*arguments) as process:
        _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert said in " ".join(err.split())


def test_a_port_that_is_taken_is_named(httpserver: HTTPServer) -> None:
    with run("--url", "http://127.0.0.1:1", "--port", str(httpserver.port)) as process:
        _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert f"port {httpserver.port} cannot be used" in err


def test_the_page_knows_how_large_a_picture_an_endpoint_takes(httpserver: HTTPServer) -> None:
    """A picture of just that size reaches the endpoint as it is."""
    most = 100_000
    bodies: list[bytes] = []

    def predict(request: Request) -> Response:
        bodies.append(request.data)
        answer = Answer(0, [], 64, 48, {"name": "m", "version": "1"}).as_json()
        return Response(json.dumps({"predictions": [answer]}), content_type="application/json")

    httpserver.expect_request("/v1/e:predict", method="POST").respond_with_handler(predict)
    counter = Endpoint(Address(httpserver.url_for("/v1/e"), most))
    with contextlib.closing(counter), served(Web(counter, "an endpoint")) as server:
        (largest,) = re.findall(r'content="(\d+)"', httpx.get(server.url).text)
        picture = PICTURE + bytes(int(largest) - len(PICTURE))
        answer = httpx.post(server.url + ROUTE, content=picture, params={"detail": "full", "candidates": "0.05"})
        assert "note" not in answer.json()
        assert 0.98 * most < len(bodies[0]) <= most


@pytest.mark.slow
def test_a_browser_makes_a_picture_smaller_for_an_endpoint(chromium: Browser, web: Web, data: Path) -> None:
    counter = web.counter
    assert isinstance(counter, Counting)
    web.page = page(60_000, "an endpoint")
    for one in opened(chromium, web.url, "phone"):
        add(one, data / "people" / "bus.jpg")
        assert one.locator("#count").inner_text() == "1"
        expect(one.get_by_text("made smaller before it was sent")).to_be_visible()
        expect(one.get_by_text("They go to an endpoint and are not kept")).to_be_visible()
    ((sent, parameters),) = counter.asked
    assert len(sent) <= 60_000
    assert parameters == Parameters(candidates=0.05)
