"""Vertex AI over REST: one project and location, requests as JSON, Google's and the network's errors as ours.

https://cloud.google.com/vertex-ai/docs/reference/rest
Google's generated clients are not used: importing them takes 3 s of processor time (their package loads all services of
Vertex AI), they ask for operations under a path of the console, /ui/, they cannot read an operation that was started
through another version of the API, as the google provider does, and v1 and v1beta1 are separate clients. What would be
left of them here is the names of the fields.
"""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final
from urllib.parse import quote, urlencode

from .access import Access
from .definition import VERSION
from .engine_call import EngineCall
from .errors import PassingError, ProblemError, RefusedError
from .network import REQUEST_SECONDS, translated
from .registry import RegistryClient
from .retries import repeated
from .wire import Wire

# Whose clients gcloud's own credentials are, of `gcloud auth application-default login` and of `gcloud auth login`.
GCLOUD_PROJECTS: Final = ("764086051850", "32555940559")
V1, V1BETA1 = "v1", "v1beta1"
TEMPLATE_BYTES: Final = 4 * 2**20  # far more than Vertex AI takes as one request


@dataclass
class VertexApi:
    access: Access
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _locks: dict[str, threading.Lock] = field(default_factory=dict)

    @property
    def parent(self) -> str:
        return f"projects/{self.access.project}/locations/{self.access.location}"

    def lock(self, name: str) -> threading.Lock:
        """One lock for each model and endpoint: mutations of one are done one after the other."""
        with self._lock:
            return self._locks.setdefault(name, threading.Lock())

    @cached_property
    def _session(self) -> Any:
        from google.auth.transport.requests import AuthorizedSession

        session = AuthorizedSession(self.access.authorize())  # type: ignore[no-untyped-call]
        session.headers["User-Agent"] = f"pulumi-vertex/{VERSION}"
        return session

    @cached_property
    def registry(self) -> RegistryClient:
        """Docker registries, asked with the same credentials."""
        return RegistryClient(self.access)

    # -- requests

    def change(self, http: str, path: str, body: Wire | None = None, *, version: str = V1, **query: str) -> Wire:
        """A request that changes something, sent once. Raises RefusedError, or PassingError where it may pass.

        It is never repeated blindly: `converge` looks first whether it arrived.
        """
        return self._send(http, path, body, version, query)

    def read(self, call: EngineCall, path: str, *, version: str = V1, **query: str) -> Wire:
        """A request that changes nothing, repeated while the fault may pass. Raises RefusedError."""
        return repeated(call, lambda: self._send("GET", path, None, version, query))

    def find(self, call: EngineCall, path: str, *, version: str = V1) -> Wire | None:
        """What a name stands for, or None where there is no such thing."""
        try:
            return self.read(call, path, version=version)
        except RefusedError as error:
            if error.status == "NOT_FOUND":
                return None
            raise

    def listed(self, call: EngineCall, path: str, field_name: str, **query: str) -> list[Wire]:
        """All pages of a list; nothing where what is listed does not exist."""
        found: list[Wire] = []
        page: dict[str, str] = {}
        while True:
            try:
                answer = self.read(call, path, **query, **page)
            except RefusedError as error:
                if error.status == "NOT_FOUND":
                    return found
                raise
            found += answer.get(field_name, [])
            if not answer.get("nextPageToken"):
                return found
            page = {"pageToken": str(answer["nextPageToken"])}

    def log_entries(self, body: Wire) -> list[Wire]:
        """One page of entries of Cloud Logging, asked once. Raises RefusedError or PassingError.

        https://cloud.google.com/logging/docs/reference/v2/rest/v2/entries/list
        """
        url = f"{self.access.logging_url}/v2/entries:list"
        answer = self._ask("Cloud Logging", "POST", url, {"resourceNames": [f"projects/{self.access.project}"], **body})
        entries: list[Wire] = answer.get("entries", [])
        return entries

    def template(self, call: EngineCall, uri: str) -> str | None:
        """The text of a pipeline's template in a bucket or a repository; None where there is none. Raises ProblemError.

        https://cloud.google.com/vertex-ai/docs/pipelines/create-pipeline-template
        """
        if uri.startswith("gs://"):
            bucket, _, name = uri.removeprefix("gs://").partition("/")
            service, url = "Cloud Storage", f"{self.access.storage_url}/storage/v1/b/{bucket}/o/{quote(name, safe='')}"
            url += "?alt=media"
        else:
            service, url = "Artifact Registry", self.access.kfp_url(uri)

        def once() -> str | None:
            with self._session.get(url, timeout=REQUEST_SECONDS, stream=True) as answer:
                if answer.status_code == 404:
                    return None
                content = answer.raw.read(TEMPLATE_BYTES + 1, decode_content=True)
                if answer.status_code >= 400:
                    raise explained(answer.status_code, content, self.access, service)
            if len(content) > TEMPLATE_BYTES:
                raise ProblemError(
                    f"{uri} has more than {TEMPLATE_BYTES // 2**20} MiB and is no template of a pipeline."
                )
            try:
                return str(content.decode())
            except UnicodeDecodeError:
                raise ProblemError(f"{uri} is no text, and so no template of a pipeline.") from None

        return repeated(
            call, lambda: translated(f"{service} cannot be reached at {'/'.join(url.split('/')[:3])}", once)
        )

    def _send(self, http: str, path: str, body: Wire | None, version: str, query: dict[str, str]) -> Wire:
        url = f"{self.access.url}/{version}/{path}" + (f"?{urlencode(query)}" if query else "")
        return self._ask("Vertex AI", http, url, body)

    def _ask(self, service: str, http: str, url: str, body: Wire | None) -> Wire:
        def once() -> Wire:
            answer = self._session.request(http, url, json=body, timeout=REQUEST_SECONDS)
            if answer.status_code >= 400:
                raise explained(answer.status_code, answer.content, self.access, service)
            parsed: Wire = answer.json()
            return parsed

        return translated(f"{service} cannot be reached at {'/'.join(url.split('/')[:3])}", once)


def _foreign_consumer(error: Wire, project: str) -> str:
    """The project for which an API is disabled, where that is not ours; "" for every other error.

    https://cloud.google.com/apis/docs/troubleshooting#service_disabled
    """
    for detail in error.get("details") or []:
        consumer = str(detail.get("metadata", {}).get("consumer", "")).removeprefix("projects/")
        if detail.get("reason") != "SERVICE_DISABLED" or not consumer or consumer == project:
            continue
        # Our own project may be known by its id alone, and the answer has its number.
        if consumer in GCLOUD_PROJECTS or (project.isdigit() and consumer.isdigit()):
            return consumer
    return ""


def explained(code: int, content: bytes, access: Access, service: str = "Vertex AI") -> ProblemError:
    """An answer that is an error: `code` is its HTTP status, `content` its body."""
    try:
        body = json.loads(content)["error"]
        status, words = str(body.get("status", "UNKNOWN")), str(body["message"])  # Cloud Storage names no status
    except (ValueError, KeyError, TypeError, AttributeError):  # of a proxy, or cut off
        body, status = {}, "UNKNOWN"
        words = content[:300].decode(errors="replace").strip() or "(no explanation)"
    if consumer := _foreign_consumer(body, access.project):
        # This never passes by itself, unlike an API that was enabled a moment ago.
        return ProblemError(
            f"Google counts your requests as those of project {consumer}, where the API is disabled, and not of "
            f"{access.project}, because your credentials name no quota project. {access.quota_repair}"
        )
    message = f"{service} answered {code} {status}: {words}"
    # A quota that is used up answers 429 too, and trying again does not help it.
    rate_limited = code == 429 and "quotas are exceeded" not in words
    if rate_limited or code in (502, 503, 504):
        return PassingError(message)
    return RefusedError(status, message)
