"""`headcount count --stack`: through the endpoint of a stack, whose payloads are small."""

from __future__ import annotations

import base64
import http.server
import io
import json
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from headcount import Client, CountError
from headcount.cli import app

LIMIT = 200_000  # bytes of a request


class Endpoint(http.server.BaseHTTPRequestHandler):
    """Finds one person over the whole of what it gets, as wide and high as that is."""

    asked: list[dict[str, Any]] = []  # noqa: RUF012

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        request = json.loads(body)
        self.asked.append({"path": self.path, "size": len(body), "parameters": request["parameters"]})
        picture = Image.open(io.BytesIO(base64.b64decode(request["instances"][0]["image"]["b64"])))
        prediction = {
            "count": 1,
            "people": [{"box": [0, 0, picture.width, picture.height], "confidence": 0.9}],
            "image": {"width": picture.width, "height": picture.height},
            "model": {"name": "yolov5n", "version": "1"},
        }
        answer = (
            {"error": {"code": 400, "message": "too large"}} if len(body) > LIMIT else {"predictions": [prediction]}
        )
        content = json.dumps(answer).encode()
        self.send_response(400 if "error" in answer else 200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def stack(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    Endpoint.asked.clear()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    where = {"url": f"http://127.0.0.1:{server.server_port}/v1/e/1", "needs_token": False, "max_bytes": LIMIT}
    real = subprocess.run

    def told(command: list[str], **options: Any) -> Any:
        if command[1:4] == ["-m", "infra.stacks", "endpoint"]:
            assert command[4] == "dev"
            return subprocess.CompletedProcess(command, 0, json.dumps(where), "")
        return real(command, **options)

    monkeypatch.setattr(subprocess, "run", told)
    yield
    server.shutdown()
    server.server_close()


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    noise = np.random.default_rng(0).integers(0, 255, (900, 1200, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "large.jpg", quality=95)
    Image.fromarray(noise[:60, :80]).save(tmp_path / "small.jpg")
    return tmp_path


def test_a_picture_over_the_limit_is_sent_smaller_and_says_so(stack: None, pictures: Path) -> None:
    run = CliRunner().invoke(
        app, ["count", str(pictures), "--stack", "dev", "--json", "--annotate", str(pictures / "out")]
    )
    assert run.exit_code == 0, run.output
    large, small = json.loads(run.stdout)["pictures"]
    assert large["image"] == {"width": 1200, "height": 900}
    np.testing.assert_allclose(large["people"][0]["box"], [0, 0, 1200, 900], atol=2)
    assert small["image"] == {"width": 80, "height": 60}
    assert "large.jpg: sent at " in run.stderr
    assert "the endpoint takes 0.2 MB a request" in run.stderr
    assert "small.jpg" not in run.stderr
    assert all(one["path"] == "/v1/e/1:predict" and one["size"] <= LIMIT for one in Endpoint.asked)
    drawn = Image.open(pictures / "out" / "large.counted.jpg")
    assert drawn.size == (1200, 900), "the original, drawn on here"


def test_parameters_reach_the_endpoint(stack: None, pictures: Path) -> None:
    with Client(stack="dev") as client:
        client.count(pictures / "small.jpg", confidence=0.5, max_people=3, region=[(0, 0), (1, 0), (1, 1)])
    assert Endpoint.asked[0]["parameters"] == {"confidence": 0.5, "max_people": 3, "region": [[0, 0], [1, 0], [1, 1]]}


def test_what_is_wrong_with_the_stack_is_said_in_its_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def told(command: list[str], **_: Any) -> Any:
        return subprocess.CompletedProcess(command, 1, "", "Stack dev is not deployed. Deploy it: pulumi up -s dev\n")

    monkeypatch.setattr(subprocess, "run", told)
    with pytest.raises(CountError, match=r"^Stack dev is not deployed\. Deploy it: pulumi up -s dev$"):
        Client(stack="dev")
