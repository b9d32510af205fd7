"""The comment on a pull request, against a stub of GitHub's REST API.

https://docs.github.com/en/rest/issues/comments, of which the stub has the routes, statuses, fields and pages.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT
from pytest_httpserver import HTTPServer
from typer.testing import CliRunner
from werkzeug import Request, Response

from headcount.cli import app
from review.github import CommentError, PullRequest, post

TOKEN = "ghs_a-token"
REPOSITORY = "my-team/headcount"
MARKER = "<!-- headcount review: dev -->"
PER_PAGE = 2


class GitHub:
    """The comments of pull request 7. login: who has the token; None for a workflow's, which may not ask that."""

    def __init__(self, server: HTTPServer) -> None:
        self.url = server.url_for("").rstrip("/")
        self.login: str | None = None
        self.comments: list[dict[str, Any]] = []
        self.refuses = ""  # the method of a request that the token may not make
        server.expect_request(re.compile(".*")).respond_with_handler(self.answer)

    def add(self, login: str, body: str) -> dict[str, Any]:
        id_ = 1000 + len(self.comments)
        url = f"https://github.com/{REPOSITORY}/pull/7#issuecomment-{id_}"
        self.comments.append({"id": id_, "user": {"login": login}, "body": body, "html_url": url})
        return self.comments[-1]

    def answer(self, request: Request) -> Response:
        if request.headers.get("authorization") != f"Bearer {TOKEN}":
            return said(401, {"message": "Bad credentials"})
        if request.method == self.refuses:
            return said(403, {"message": "Resource not accessible by integration"})
        assert request.headers["accept"] == "application/vnd.github+json"
        assert request.headers["x-github-api-version"] == "2022-11-28"
        if request.path == "/user":
            if self.login is None:
                return said(403, {"message": "Resource not accessible by integration"})
            return said(200, {"login": self.login})
        body = request.get_json(silent=True) or {}
        if request.path == f"/repos/{REPOSITORY}/issues/7/comments":
            if request.method == "POST":
                if len(body["body"]) > 65_536:
                    errors = [{"resource": "IssueComment", "code": "unprocessable", "message": "Body is too long"}]
                    return said(422, {"message": "Validation Failed", "errors": errors})
                return said(201, self.add(self.login or "github-actions[bot]", body["body"]))
            page = int(request.args.get("page", 1))
            found = said(200, self.comments[(page - 1) * PER_PAGE : page * PER_PAGE])
            if page * PER_PAGE < len(self.comments):
                found.headers["Link"] = f'<{request.base_url}?per_page=100&page={page + 1}>; rel="next"'
            return found
        match = re.fullmatch(rf"/repos/{REPOSITORY}/issues/comments/(\d+)", request.path)
        if match and request.method == "PATCH":
            (comment,) = (c for c in self.comments if c["id"] == int(match[1]))
            comment["body"] = body["body"]
            return said(200, comment)
        return said(404, {"message": "Not Found"})


def said(status: int, body: Any) -> Response:
    return Response(json.dumps(body), status=status, content_type="application/json")


@pytest.fixture
def github(httpserver: HTTPServer) -> Iterator[GitHub]:
    yield GitHub(httpserver)
    httpserver.check_assertions()


def to(github: GitHub) -> PullRequest:
    return PullRequest(REPOSITORY, 7, TOKEN, github.url)


def bodies(github: GitHub) -> list[str]:
    return [comment["body"] for comment in github.comments]


def test_the_first_comment_is_made_and_the_next_ones_change_it_in_place(github: GitHub) -> None:
    for _ in range(5):  # more than a page
        github.add("somebody", "looks good")
    first = post(to(github), MARKER, f"{MARKER} one")
    assert post(to(github), MARKER, f"{MARKER} two") == first == github.comments[-1]["html_url"]
    assert bodies(github) == ["looks good"] * 5 + [f"{MARKER} two"]


def test_each_stack_has_a_comment_of_its_own(github: GitHub) -> None:
    other = MARKER.replace("dev", "prod")
    post(to(github), MARKER, f"{MARKER} one")
    post(to(github), other, f"{other} one")
    post(to(github), MARKER, f"{MARKER} two")
    assert bodies(github) == [f"{MARKER} two", f"{other} one"]


def test_a_comment_of_somebody_else_with_the_marker_is_left_alone(github: GitHub) -> None:
    """Its author could change the review afterwards."""
    github.add("mallory", f"{MARKER} all is well")
    post(to(github), MARKER, f"{MARKER} real")
    assert bodies(github) == [f"{MARKER} all is well", f"{MARKER} real"]


def test_from_a_laptop_the_user_s_own_comment_is_changed(github: GitHub) -> None:
    github.login = "me"
    github.add("github-actions[bot]", f"{MARKER} of the workflow")
    for text in ("one", "two"):
        post(to(github), MARKER, f"{MARKER} {text}")
    assert bodies(github) == [f"{MARKER} of the workflow", f"{MARKER} two"]


def test_a_comment_that_quotes_the_marker_is_another_one(github: GitHub) -> None:
    github.add("github-actions[bot]", f"The review begins with {MARKER}")
    post(to(github), MARKER, f"{MARKER} one")
    assert len(github.comments) == 2


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_refusal_says_which_permission_is_missing(github: GitHub, method: str) -> None:
    github.refuses = method
    with pytest.raises(CommentError, match=r"403 .*Resource not accessible.*pull-requests: write") as caught:
        post(to(github), MARKER, MARKER)
    assert TOKEN not in str(caught.value)


def test_a_comment_that_is_too_long_is_refused_with_github_s_words(github: GitHub) -> None:
    with pytest.raises(CommentError, match=r"422 .*Validation Failed: Body is too long"):
        post(to(github), MARKER, "x" * 65_537)


def test_a_server_that_does_not_answer_is_told() -> None:
    with pytest.raises(CommentError, match="GitHub does not answer"):
        post(PullRequest(REPOSITORY, 7, TOKEN, "http://127.0.0.1:1"), MARKER, MARKER)


def test_the_pull_request_is_that_of_the_workflow() -> None:
    environment = {"GITHUB_TOKEN": TOKEN, "GITHUB_REPOSITORY": REPOSITORY, "GITHUB_REF": "refs/pull/7/merge"}
    assert PullRequest.of(environment) == PullRequest(REPOSITORY, 7, TOKEN, "https://api.github.com")
    for name, wrong in (("GITHUB_TOKEN", ""), ("GITHUB_REPOSITORY", "../x/y"), ("GITHUB_REF", "refs/heads/main")):
        with pytest.raises(CommentError, match=name):
            PullRequest.of({**environment, name: wrong})


def test_the_command_posts_its_review(github: GitHub, monkeypatch: pytest.MonkeyPatch) -> None:
    log = ROOT / "tests" / "reviews" / "canary.jsonl"
    command = ["review", "dev", "--events", str(log), "--post"]
    run = CliRunner().invoke(app, command)
    assert run.exit_code == 1
    assert "GITHUB_TOKEN" in run.stderr
    for name, value in (
        ("GITHUB_TOKEN", TOKEN),
        ("GITHUB_REPOSITORY", REPOSITORY),
        ("GITHUB_REF", "refs/pull/7/merge"),
        ("GITHUB_API_URL", github.url),
    ):
        monkeypatch.setenv(name, value)
    run = CliRunner().invoke(app, command)
    assert run.exit_code == 2
    assert run.stderr.strip() == github.comments[0]["html_url"]
    assert bodies(github) == [Path(log).with_suffix(".md").read_text()]
