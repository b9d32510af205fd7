"""Google's REST APIs, or the sandbox's: where they are for a stack, and how they are asked."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from headcount.credentials import Credentials


class GoogleError(Exception):
    """An API refuses or does not answer; the message names its address."""


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

    def pages(self, method: str, url: str, field: str, body: dict[str, Any] | None = None) -> Iterator[dict[str, Any]]:
        """The items of a list, page after page."""
        page: dict[str, str] = {}
        while True:
            answer = self.ask(method, url, body and body | page, **({} if body else page))
            yield from answer.get(field, [])
            if not answer.get("nextPageToken"):
                return
            page = {"pageToken": str(answer["nextPageToken"])}

    def ask(self, method: str, url: str, body: dict[str, Any] | None = None, **query: str) -> dict[str, Any]:
        import httpx

        headers = self._credentials.header() if self._credentials else {}
        try:
            answer = self._http.request(method, url, headers=headers, json=body, params=query)
            content: dict[str, Any] = answer.json()
        except (httpx.TransportError, ValueError) as error:
            raise GoogleError(f"{url} does not answer: {error}") from None
        if answer.status_code >= 400:
            raise GoogleError(f"{url} answers {answer.status_code}: {content.get('error', {}).get('message', '')}")
        return content
