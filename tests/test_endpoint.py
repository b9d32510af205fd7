"""Counting through an endpoint: its small payloads, its address, and the caller's credentials."""

from __future__ import annotations

import base64
import io
import json
import ssl
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trustme
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from helpers import encode
from PIL import Image
from pytest_httpserver import HTTPServer
from typer.testing import CliRunner
from werkzeug import Request, Response

from headcount import Client, CountError, endpoint
from headcount.cli import app
from headcount.credentials import Credentials, CredentialsError
from infra import prediction

LIMIT = 200_000  # bytes of a request
NAME = "projects/p/locations/europe-west4/endpoints/1"


# As recorded from Vertex AI.
COLD = {
    "error": {
        "code": 429,
        "status": "RESOURCE_EXHAUSTED",
        "message": "Model is not yet ready for inference. Please wait while model completes scale-up from zero, then "
        "try your request again.",
    }
}


def test_a_model_that_comes_up_from_zero_is_waited_for(
    httpserver: HTTPServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("headcount.counters.COLD_PAUSE", 0.01)
    monkeypatch.setattr(endpoint, "outputs", lambda _: {"url": httpserver.url_for("/v1/e/1"), "maxRequestBytes": LIMIT})
    for _ in range(20):  # more often than any other refusal is tried again
        httpserver.expect_ordered_request("/v1/e/1:predict").respond_with_json(COLD, status=429)
    httpserver.expect_ordered_request("/v1/e/1:predict").respond_with_handler(predict)
    Image.new("RGB", (80, 60)).save(tmp_path / "picture.jpg")
    with Client(stack="dev") as client:
        assert client.count(tmp_path / "picture.jpg").count == 1
    assert [r.message for r in caplog.records if r.name == "headcount"] == [
        "The model is scaled to zero. Waiting until it is up, 30 minutes at most."
    ]
    monkeypatch.setattr("headcount.counters.COLD_SECONDS", 0.0)
    httpserver.clear()
    httpserver.expect_request("/v1/e/1:predict").respond_with_json(COLD, status=429)
    with Client(stack="dev") as client, pytest.raises(CountError, match="did not come up within"):
        client.count(tmp_path / "picture.jpg")


def predict(request: Request) -> Response:
    """Finds one person over the whole of the picture, as wide and high as it is."""
    if len(request.data) > LIMIT:
        return Response(json.dumps({"error": {"code": 400, "message": "too large"}}), 400)
    picture = Image.open(io.BytesIO(base64.b64decode(json.loads(request.data)["instances"][0]["image"]["b64"])))
    prediction = {
        "count": 1,
        "people": [{"box": [0, 0, picture.width, picture.height], "confidence": 0.9}],
        "image": {"width": picture.width, "height": picture.height},
        "model": {"name": "yolov5n", "version": "1"},
    }
    return Response(json.dumps({"predictions": [prediction]}))


@pytest.fixture
def stack(httpserver: HTTPServer, monkeypatch: pytest.MonkeyPatch) -> HTTPServer:
    """The endpoint of stack dev, in the sandbox."""
    found = {"url": httpserver.url_for("/v1/e/1"), "maxRequestBytes": LIMIT}
    monkeypatch.setattr(endpoint, "outputs", lambda name: found if name == "dev" else pytest.fail(name))
    httpserver.expect_request("/v1/e/1:predict", method="POST").respond_with_handler(predict)
    return httpserver


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    noise = np.random.default_rng(0).integers(0, 255, (900, 1200, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "large.jpg", quality=95)
    Image.fromarray(noise[:60, :80]).save(tmp_path / "small.jpg")
    return tmp_path


def test_a_picture_over_the_limit_is_sent_smaller_and_says_so(stack: HTTPServer, pictures: Path) -> None:
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
    assert all(len(request.data) <= LIMIT for request, _ in stack.log)
    with Image.open(pictures / "out" / "large.counted.jpg") as drawn:
        assert drawn.size == (1200, 900), "the original, drawn on here"


def test_a_picture_is_sent_with_the_pixels_that_will_be_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """One look sees no more than those of a smaller picture; closer looks see what fits into the request."""
    large = encode(Image.effect_noise((3000, 20), 5), "PNG")
    room = len(large)  # its base64 is larger
    monkeypatch.setattr(endpoint, "LONGEST_SIDE", 2000)
    for detail, size in (("fast", (2000, 13)), ("full", (3000, 20)), ("auto", (3000, 20))):
        sent = endpoint.fit(large, room, endpoint.longest_side(detail))
        assert sent.size == size
        assert len(sent.data) * 4 / 3 <= room


def test_parameters_reach_the_endpoint(stack: HTTPServer, pictures: Path) -> None:
    with Client(stack="dev") as client:
        region = [(0, 0), (1, 0), (1, 1)]
        client.count(pictures / "small.jpg", confidence=0.5, max_people=3, region=region, detail="full", grid="4x3")
    sent = json.loads(stack.log[0][0].data)["parameters"]
    assert sent.pop("region") == [[0, 0], [1, 0], [1, 1]]
    assert sent == {"confidence": 0.5, "max_people": 3, "detail": "full", "grid": "4x3"}


def test_what_is_wrong_with_the_stack_is_said_in_its_own_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "Pulumi.yaml").write_text("name: headcount\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CountError, match=r"^Stack local is not deployed\. Deploy it: make up$"):
        Client(stack="local")


# Google's endpoints, which want a token


@pytest.fixture(scope="session")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def google(authority: trustme.CA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HTTPServer]:
    """An endpoint on HTTPS, and the server that gives tokens for Application Default Credentials."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "ca.pem"))
    key = rsa.generate_private_key(65537, 2048).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    with HTTPServer(ssl_context=context) as server:
        account = {
            "type": "service_account", "client_email": "me@p.iam.gserviceaccount.com", "private_key": key.decode(),
            "token_uri": server.url_for("/token"),
        }  # fmt: skip
        (tmp_path / "account.json").write_text(json.dumps(account))
        monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "account.json"))
        server.expect_request(f"/v1/{NAME}:predict", method="POST").respond_with_handler(predict)
        yield server


def test_the_credentials_token_is_sent_and_renewed(google: HTTPServer, pictures: Path) -> None:
    seconds = [1, 3600]  # until a token ends

    def token(_: Request) -> Response:
        number = 3 - len(seconds)
        granted = {"access_token": f"token-{number}", "expires_in": seconds.pop(0), "token_type": "Bearer"}
        return Response(json.dumps(granted), content_type="application/json")

    google.expect_request("/token", method="POST").respond_with_handler(token)
    with Client(endpoint=google.url_for(f"/v1/{NAME}")) as client:
        for _ in range(3):
            assert client.count(pictures / "small.jpg").count == 1
    sent = [request.headers["Authorization"] for request, _ in google.log if request.path.endswith(":predict")]
    assert sent == ["Bearer token-1", "Bearer token-2", "Bearer token-2"]


def test_refused_credentials_say_how_to_get_others(google: HTTPServer, pictures: Path) -> None:
    google.expect_request("/token").respond_with_json({"error": "invalid_grant"}, 400)
    with Client(endpoint=google.url_for(f"/v1/{NAME}")) as client, pytest.raises(CountError, match="gcloud auth"):
        client.count(pictures / "small.jpg")


def test_without_credentials_it_says_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    with pytest.raises(CountError, match=r"no Google credentials: run `gcloud auth application-default login`"):
        Client(endpoint=f"https://localhost:1/v1/{NAME}")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "google.auth", None)
    with pytest.raises(CredentialsError, match=r"Google Cloud needs google\.auth; run `make install`"):
        Credentials()


# The address of an endpoint


@pytest.mark.parametrize(
    ("described", "url", "limit"),
    [
        ({}, f"https://europe-west4-aiplatform.googleapis.com/v1/{NAME}", 1_500_000),
        (
            {"dedicatedEndpointEnabled": True, "dedicatedEndpointDns": "1.europe-west4-2.prediction.vertexai.goog"},
            f"https://1.europe-west4-2.prediction.vertexai.goog/v1/{NAME}",
            10 * 2**20,
        ),
        (
            {"dedicatedEndpointEnabled": True, "dedicatedEndpointDns": "https://1.x-2.prediction.vertexai.goog"},
            f"https://1.x-2.prediction.vertexai.goog/v1/{NAME}",
            10 * 2**20,
        ),
    ],
    ids=["shared", "dedicated", "dedicated with a scheme"],
)
def test_an_endpoint_by_name_is_asked_where_it_answers(
    monkeypatch: pytest.MonkeyPatch, described: dict[str, Any], url: str, limit: int
) -> None:
    regional = f"https://europe-west4-aiplatform.googleapis.com/v1/{NAME}"
    monkeypatch.setattr(endpoint, "describe", {regional: described}.__getitem__)
    assert endpoint.of_name(NAME) == endpoint.Address(url, limit)


def test_a_dedicated_endpoint_without_a_name_yet_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "describe", lambda url: {"dedicatedEndpointEnabled": True})
    with pytest.raises(CountError, match="no DNS name yet: it gets one with its first deployment"):
        endpoint.of_name(NAME)


def test_a_text_that_is_no_endpoint_is_refused() -> None:
    run = CliRunner().invoke(app, ["count", "a.jpg", "--endpoint", "europe-west4/1"])
    assert run.exit_code == 2
    assert "'europe-west4/1' is not an endpoint; give projects/PROJECT/locations/REGION/endpoints/ID" in run.stderr


def test_googles_refusal_is_passed_on(httpserver: HTTPServer) -> None:
    httpserver.expect_request(f"/v1/{NAME}").respond_with_json({"error": {"message": "no such endpoint"}}, 404)
    with pytest.raises(CountError, match="answers 404: no such endpoint"):
        endpoint.describe(httpserver.url_for(f"/v1/{NAME}"))


def test_the_request_limits_are_the_program_s() -> None:
    assert endpoint.MAX_REQUEST_BYTES == prediction.MAX_REQUEST_BYTES
