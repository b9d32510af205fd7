"""One comment for each stack on a pull request, updated in place, through GitHub's REST API.

https://docs.github.com/en/rest/issues/comments
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import httpx

API: Final = "https://api.github.com"
VERSION: Final = "2022-11-28"
WORKFLOW: Final = "github-actions[bot]"  # who comments with a workflow's own token
SECONDS: Final = 30.0
MOST_PAGES: Final = 50


class CommentError(Exception):
    """A comment could not be written; the message says how to repair it."""


@dataclass(frozen=True)
class PullRequest:
    """Where a comment goes, and the token that writes it."""

    repository: str
    number: int
    token: str
    api: str = API

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> PullRequest:
        """The pull request for which a workflow runs, from the variables that GitHub sets. Raises CommentError.

        https://docs.github.com/en/actions/reference/workflows-and-actions/variables
        """
        repository, token = environment.get("GITHUB_REPOSITORY", ""), environment.get("GITHUB_TOKEN", "")
        number = re.fullmatch(r"refs/pull/(\d+)/(merge|head)", environment.get("GITHUB_REF", ""))
        missing = [
            name
            for name, found in (
                ("GITHUB_TOKEN, a token that may write to pull requests", token),
                ("GITHUB_REPOSITORY, such as my-team/headcount", re.fullmatch(r"[\w.-]+/[\w.-]+", repository)),
                ("GITHUB_REF, such as refs/pull/7/merge", number),
            )
            if not found
        ]
        if missing or number is None:
            raise CommentError(f"A comment needs these environment variables: {'; '.join(missing)}.")
        return cls(repository, int(number[1]), token, environment.get("GITHUB_API_URL", API).rstrip("/"))


def post(to: PullRequest, marker: str, body: str) -> str:
    """Writes the comment that begins with a marker, or changes it in place; returns its URL. Raises CommentError.

    Only a comment of one's own is changed, because its author may change it again.
    """
    headers = {
        "Accept": "application/vnd.github+json",
        "Authorization": f"Bearer {to.token}",
        "X-GitHub-Api-Version": VERSION,
    }
    with httpx.Client(base_url=to.api, headers=headers, timeout=SECONDS) as client:
        comments = f"/repos/{to.repository}/issues/{to.number}/comments"
        found = _find(client, comments, marker, _login(client))
        if found:
            answer = _ask(client, "PATCH", f"/repos/{to.repository}/issues/comments/{found}", {"body": body})
        else:
            answer = _ask(client, "POST", comments, {"body": body})
    return str(answer.json()["html_url"])


def _login(client: httpx.Client) -> str:
    """Who comments. A workflow's token may not ask that."""
    answer = _send(client, "GET", "/user")
    return str(answer.json()["login"]) if answer.status_code == 200 else WORKFLOW


def _find(client: httpx.Client, comments: str, marker: str, login: str) -> int:
    """The id of one's own comment that begins with the marker, or 0."""
    url = f"{comments}?per_page=100"
    for _ in range(MOST_PAGES):
        answer = _ask(client, "GET", url)
        for comment in answer.json():
            author = (comment.get("user") or {}).get("login")
            if author == login and str(comment.get("body") or "").startswith(marker):
                return int(comment["id"])
        url = str(answer.links.get("next", {}).get("url", ""))
        if not url:
            break
    return 0


def _ask(client: httpx.Client, method: str, url: str, body: dict[str, Any] | None = None) -> httpx.Response:
    answer = _send(client, method, url, body)
    if answer.is_error:
        try:
            refusal = answer.json()
            details = [str(error.get("message", "")) for error in refusal.get("errors", ()) if isinstance(error, dict)]
            said = ": ".join([str(refusal.get("message", "")), *details])
        except (ValueError, AttributeError):
            said = answer.text[:200]
        hint = ""
        if answer.status_code in (401, 403, 404):
            hint = " The token needs the permission `pull-requests: write`, which a pull request from a fork never has."
        raise CommentError(f"GitHub answers {answer.status_code} to {method} {answer.url.path}: {said}.{hint}")
    return answer


def _send(client: httpx.Client, method: str, url: str, body: dict[str, Any] | None = None) -> httpx.Response:
    try:
        return client.request(method, url, json=body)
    except httpx.HTTPError as error:
        raise CommentError(f"GitHub does not answer {method} {url.partition('?')[0]}: {error}") from None
