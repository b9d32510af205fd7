"""The access tokens of the sandbox, got by Google's own credentials."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from google.auth.transport.requests import Request
from google.oauth2 import service_account
from google.oauth2.credentials import Credentials
from google_clients import service, service_account_key

from sandbox.testing import RunningSandbox


def user(sandbox: RunningSandbox) -> Any:
    """Credentials of a user, as `gcloud auth application-default login` leaves them."""
    info = {"refresh_token": "any", "client_id": "any", "client_secret": "any"}
    return Credentials(None, token_uri=f"{sandbox.url}/oauth2/token", **info)  # type: ignore[no-untyped-call]


def account(sandbox: RunningSandbox) -> Any:
    key, scopes = json.loads(service_account_key(sandbox)), ["https://www.googleapis.com/auth/cloud-platform"]
    return service_account.Credentials.from_service_account_info(key, scopes=scopes)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("make", [user, account])
def test_googles_credentials_get_tokens_that_expire(
    tmp_path: Path, project: str, make: Callable[[RunningSandbox], Any]
) -> None:
    with RunningSandbox("--token-lifetime", "600", state=tmp_path / "state") as running:
        credentials = make(running)
        with service(running, "cloudresourcemanager", "v1", credentials) as client:
            assert client.projects().get(projectId=project).execute()["projectId"] == project
        token = {"authorization": f"Bearer {credentials.token}"}
        url = f"{running.url}/cloudresourcemanager/v1/projects/{project}"
        running.advance(300)
        assert httpx.get(url, headers=token, trust_env=False).status_code == 200
        running.advance(301)
        refused = httpx.get(url, headers=token, trust_env=False)
        assert (refused.status_code, refused.json()["error"]["status"]) == (401, "UNAUTHENTICATED")
        bucket = httpx.get(f"{running.url}/storage/v1/b/any", headers=token, trust_env=False).json()["error"]
        assert (bucket["code"], bucket["errors"][0]["reason"]) == (401, "authError")

        credentials.refresh(Request())
        token = {"authorization": f"Bearer {credentials.token}"}
        assert httpx.get(url, headers=token, trust_env=False).status_code == 200
        wrong = httpx.post(f"{running.url}/oauth2/token", data={"grant_type": "password"}, trust_env=False)
        assert wrong.json()["error"] == "unsupported_grant_type"
