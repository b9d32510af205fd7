"""Google's REST APIs, or the sandbox's: where they are for a stack, and how they are asked."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from headcount.credentials import Credentials


class GoogleError(Exception):
    """An API refuses or does not answer; the message names its address.

    status: of its answer, in HTTP; 0 where there is none.
    """

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Place:
    """A project and a region. base: address of the sandbox that stands for Google, "" for Google itself."""

    project: str
    region: str
    base: str = ""

    @property
    def vertex(self) -> str:
        return self.base or f"https://{self.region}-aiplatform.googleapis.com"

    @property
    def logging(self) -> str:
        return self.api("logging")

    def api(self, name: str) -> str:
        """The address of an API that has one host for all regions, such as `iam`."""
        return f"{self.base}/{name}" if self.base else f"https://{name}.googleapis.com"


def place_of(outputs: dict[str, Any]) -> Place:
    """Where the stack with these outputs is. Raises GoogleError."""
    match = re.match(r"projects/([^/]+)/locations/([^/]+)/", str(outputs.get("endpoint", "")))
    if not match:
        raise GoogleError("The stack has no endpoint among its outputs: run `pulumi up` first.")
    sandbox = re.match(r"http://[^/]+", str(outputs.get("url", "")))
    return Place(match[1], match[2], sandbox[0] if sandbox else "")


class Google:
    """Asks the APIs of one place, on Google with Application Default Credentials.

    Raises GoogleError and CredentialsError.
    """

    def __init__(self, place: Place) -> None:
        import httpx

        self.place = place
        self._credentials = None if place.base else Credentials()
        self._http = httpx.Client(timeout=60, trust_env=not place.base)

    def close(self) -> None:
        self._http.close()

    def pages(
        self, method: str, url: str, field: str, body: dict[str, Any] | None = None, **query: str
    ) -> Iterator[dict[str, Any]]:
        """The items of a list, page after page."""
        page: dict[str, str] = {}
        while True:
            answer = self.ask(method, url, body and body | page, **query, **({} if body else page))
            yield from answer.get(field, [])
            if not answer.get("nextPageToken"):
                return
            page = {"pageToken": str(answer["nextPageToken"])}

    def ask(self, method: str, url: str, body: dict[str, Any] | None = None, **query: str) -> dict[str, Any]:
        try:
            content: dict[str, Any] = json.loads(self._answer(method, url, body, query))
        except ValueError as error:
            raise GoogleError(f"{url} does not answer: {error}") from None
        return content

    def content(self, url: str) -> bytes:
        """The bytes of a file."""
        return self._answer("GET", url, None, {})

    def _answer(self, method: str, url: str, body: dict[str, Any] | None, query: dict[str, str]) -> bytes:
        import httpx

        headers = self._credentials.header() if self._credentials else {}
        try:
            answer = self._http.request(method, url, headers=headers, json=body, params=query or None)
        except httpx.TransportError as error:
            raise GoogleError(f"{url} does not answer: {error}") from None
        if answer.status_code >= 400:
            raise GoogleError(f"{url} answers {answer.status_code}: {_message(answer.content)}", answer.status_code)
        return answer.content


def _message(content: bytes) -> str:
    """The message of an error that an API answers; "" where it has none."""
    try:
        return str(json.loads(content)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return ""
