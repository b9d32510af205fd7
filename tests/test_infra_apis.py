"""APIs are waited for until they can be used, and only where waiting helps."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pulumi
import pytest
from pytest_httpserver import HTTPServer
from werkzeug import Request, Response

from infra import apis
from sandbox.testing import LOCATION, RunningSandbox

SERVICE = "aiplatform.googleapis.com"
OURS = ("my-project", "42")
STORAGE = {
    "code": 403,
    "message": "my-project is not enabled",
    "errors": [{"domain": "usageLimits", "reason": "accessNotConfigured", "message": "not configured"}],
}


def disabled(consumer: str) -> dict[str, Any]:
    """Google's answer for an API that is disabled in a project."""
    return {
        "code": 403,
        "message": f"Agent Platform API has not been used in project {consumer} before or it is disabled.",
        "status": "PERMISSION_DENIED",
        "details": [
            {
                "@type": "type.googleapis.com/google.rpc.ErrorInfo",
                "reason": "SERVICE_DISABLED",
                "domain": "googleapis.com",
                "metadata": {"consumer": f"projects/{consumer}", "service": SERVICE},
            }
        ],
    }


@pytest.fixture
def wait(httpserver: HTTPServer, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Waits for an API with the given answers: an error each, None for a good one; the last one repeats."""
    monkeypatch.setattr(apis, "AGAIN_SECONDS", 0)
    monkeypatch.setattr(apis, "_quota_project", lambda: None)

    def wait(*errors: dict[str, Any] | None, seconds: float = 60) -> None:
        left = list(errors)

        def answer(_: Request) -> Response:
            error = left.pop(0) if len(left) > 1 else left[0]
            return Response(json.dumps({"error": error} if error else {}), error["code"] if error else 200)

        httpserver.expect_request("/probe").respond_with_handler(answer)
        asyncio.run(apis.until_usable(SERVICE, httpserver.url_for("/probe"), "token", OURS, seconds))

    return wait


def test_an_api_that_is_usable_is_asked_once(wait: Callable[..., None], httpserver: HTTPServer) -> None:
    wait(None)
    (asked,) = (request for request, _ in httpserver.log)
    assert asked.headers["Authorization"] == "Bearer token"
    assert "x-goog-user-project" not in asked.headers


@pytest.mark.parametrize("error", [disabled("42"), disabled("my-project"), STORAGE], ids=["number", "id", "storage"])
def test_an_api_that_was_just_enabled_is_waited_for_until_two_good_answers(
    wait: Callable[..., None], httpserver: HTTPServer, error: dict[str, Any]
) -> None:
    wait(error, error, None, error, None)
    assert len(httpserver.log) == 6, "a good answer before a refusal does not count"


def test_credentials_without_a_quota_project_end_at_once_with_the_command(wait: Callable[..., None]) -> None:
    with pytest.raises(pulumi.RunError) as raised:
        wait(disabled("764086051850"))
    assert "looked for aiplatform.googleapis.com in projects/764086051850" in str(raised.value)
    assert "    gcloud auth application-default set-quota-project my-project" in str(raised.value).splitlines()


def test_the_quota_project_is_sent(
    wait: Callable[..., None], httpserver: HTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(apis, "_quota_project", lambda: "billed")
    wait(None)
    assert httpserver.log[0][0].headers["x-goog-user-project"] == "billed"


def test_any_other_refusal_is_left_to_the_resource(wait: Callable[..., None], httpserver: HTTPServer) -> None:
    wait({"code": 403, "message": "Permission denied", "status": "PERMISSION_DENIED"})
    assert len(httpserver.log) == 1


def test_an_api_that_does_not_become_usable_is_said_in_a_sentence(wait: Callable[..., None]) -> None:
    with pytest.raises(pulumi.RunError, match=r"^aiplatform\.googleapis\.com was enabled .* Run `pulumi up` again"):
        wait(disabled("42"), seconds=0)


def test_the_sandbox_refuses_as_google_does() -> None:
    with RunningSandbox("--api-delay", "60") as running:
        url = f"{running.url}/v1/{LOCATION}/endpoints?pageSize=1"
        with pytest.raises(pulumi.RunError, match=r"Run `pulumi up` again|is not the project"):
            asyncio.run(apis.until_usable(SERVICE, url, "token", ("a-project", "0"), seconds=0))


def test_the_number_of_a_project_is_read_without_its_billing_account(
    stub_sandbox: RunningSandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = f"{stub_sandbox.url}/cloudresourcemanager/v1/"
    monkeypatch.setenv("PULUMI_CONFIG", json.dumps({"gcp:resourceManagerCustomEndpoint": base}))
    monkeypatch.setattr(apis, "_quota_project", lambda: None)
    stub_sandbox.admin("DELETE", "requests")
    number = asyncio.run(apis.project_number("my-project", "token"))
    assert number.isdigit()
    assert [r["method"] for r in stub_sandbox.requests()] == ["cloudresourcemanager.projects.get"]


def test_a_project_that_google_does_not_show_is_said_with_the_repair(
    httpserver: HTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PULUMI_CONFIG", json.dumps({"gcp:resourceManagerCustomEndpoint": httpserver.url_for("/")}))
    monkeypatch.setattr(apis, "_quota_project", lambda: None)
    httpserver.expect_request("/projects/my-project").respond_with_data("no such project", 403)
    with pytest.raises(
        pulumi.RunError, match=r"(?s)enable cloudresourcemanager.*--project my-project.*no such project"
    ):
        asyncio.run(apis.project_number("my-project", "token"))
