"""The identity of the provider's requests, with keys and tokens of an imitation of Google."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from pytest_httpserver import HTTPServer
from werkzeug import Request, Response

from pulumi_vertex.access import Access
from pulumi_vertex.engine_call import EngineCall
from pulumi_vertex.errors import ProblemError
from pulumi_vertex.vertex_api import VertexApi

MODELS = "projects/p/locations/europe-west4/models"


@pytest.fixture(scope="module")
def private_key() -> str:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()


@pytest.fixture
def google(httpserver: HTTPServer) -> HTTPServer:
    """Answers a list of models, and notes with which headers it was asked."""

    def models(request: Request) -> Response:
        google.seen = {name: request.headers.get(name) for name in ("Authorization", "X-Goog-User-Project")}  # type: ignore[attr-defined]
        return Response("{}", content_type="application/json")

    google = httpserver
    google.expect_request(f"/v1/{MODELS}").respond_with_handler(models)
    return google


def seen(google: HTTPServer, **access: Any) -> dict[str, str | None]:
    """The headers of one request with these settings."""
    api = VertexApi(Access("p", "europe-west4", google.url_for("").rstrip("/"), **access))
    api.listed(EngineCall("urn", 30, threading.Event()), MODELS, "models")
    found: dict[str, str | None] = google.seen  # type: ignore[attr-defined]
    return found


def account(google: HTTPServer, private_key: str) -> dict[str, str]:
    """The key of a service account whose tokens come from the imitation."""
    google.expect_request("/token", method="POST").respond_with_json(
        {"access_token": "of-the-key", "expires_in": 3600, "token_type": "Bearer"}
    )
    return {
        "type": "service_account",
        "project_id": "p",
        "private_key_id": "1",
        "private_key": private_key,
        "client_email": "deployer@p.iam.gserviceaccount.com",
        "client_id": "1",
        "token_uri": google.url_for("/token"),
    }


def test_on_this_machine_no_credentials_are_needed(google: HTTPServer) -> None:
    assert seen(google)["Authorization"] is None


def test_a_token_is_sent_as_it_is(google: HTTPServer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert seen(google, access_token="t0ken") == {"Authorization": "Bearer t0ken", "X-Goog-User-Project": None}
    monkeypatch.setenv("GOOGLE_CLOUD_QUOTA_PROJECT", "who-pays")
    assert seen(google, access_token="t0ken")["X-Goog-User-Project"] == "who-pays"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the general loader of keys, Google's advice
@pytest.mark.parametrize("as_file", [False, True])
def test_a_key_is_exchanged_for_a_token(google: HTTPServer, private_key: str, tmp_path: Path, as_file: bool) -> None:
    key = json.dumps(account(google, private_key))
    if as_file:
        (tmp_path / "key.json").write_text(key)
        key = str(tmp_path / "key.json")
    assert seen(google, credentials=key)["Authorization"] == "Bearer of-the-key"


def test_application_default_credentials_are_used_where_nothing_is_said(
    google: HTTPServer, private_key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    user = {
        "type": "authorized_user",
        "client_id": "1",
        "client_secret": "s",
        "refresh_token": "r",
        "quota_project_id": "who-pays",
    }
    monkeypatch.setattr("google.oauth2.credentials._GOOGLE_OAUTH2_TOKEN_ENDPOINT", google.url_for("/token"))
    account(google, private_key)
    (tmp_path / "adc.json").write_text(json.dumps(user))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "adc.json"))
    # An address that is not this machine's: the imitation is reached by another name of it.
    monkeypatch.setattr("pulumi_vertex.access.is_loopback", lambda _: False)
    assert seen(google) == {"Authorization": "Bearer of-the-key", "X-Goog-User-Project": "who-pays"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_another_account_is_impersonated(google: HTTPServer, private_key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    email = "robot@p.iam.gserviceaccount.com"
    asked = f"/v1/projects/-/serviceAccounts/{email}:generateAccessToken"
    google.expect_request(asked, method="POST", headers={"Authorization": "Bearer of-the-key"}).respond_with_json(
        {"accessToken": "of-the-robot", "expireTime": "2999-01-01T00:00:00Z"}
    )
    monkeypatch.setattr(
        "google.auth.iam._IAM_ENDPOINT",
        google.url_for("/v1/projects/-/serviceAccounts/{}:generateAccessToken").replace("%7B%7D", "{}"),
    )
    key = json.dumps(account(google, private_key))
    headers = seen(google, credentials=key, impersonate_service_account=email)
    assert headers["Authorization"] == "Bearer of-the-robot"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_token_that_google_refuses_says_what_to_do(google: HTTPServer, private_key: str) -> None:
    key = account(google, private_key)
    google.clear_all_handlers()
    google.expect_request("/token").respond_with_json({"error": "invalid_grant"}, status=400)
    with pytest.raises(ProblemError, match="gcloud auth application-default login"):
        seen(google, credentials=json.dumps(key))


def test_settings_come_from_the_environment_where_the_program_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOOGLE_PROJECT", "from-environment")
    monkeypatch.setenv("GOOGLE_REGION", "us-central1")
    monkeypatch.setenv("GOOGLE_OAUTH_ACCESS_TOKEN", "t0ken")
    found = Access.of({"location": "europe-west4"})
    assert (found.project, found.location, found.access_token) == ("from-environment", "europe-west4", "t0ken")
    assert found.url == "https://europe-west4-aiplatform.googleapis.com"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_key_that_is_no_key_is_not_quoted() -> None:
    for key in ('{"private_key": "hunter2"}', "hunter2-is-no-file"):
        with pytest.raises(ProblemError, match="gcloud auth application-default login") as failed:
            Access("p", "l", credentials=key).authorize()
        assert "hunter2" not in str(failed.value)
    assert "hunter2" not in repr(Access("p", "l", access_token="hunter2", credentials="hunter2"))
