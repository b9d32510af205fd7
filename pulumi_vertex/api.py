"""Vertex AI as this provider calls it: clients, retries, operations, and which refusals are waited out.

Google's generated clients build and read the messages. They are imported on first use, which takes a second: a schema,
a check or a diff needs none of it.
"""

from __future__ import annotations

import importlib.util
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final, TypeVar

from .definition import ProblemError, Wire
from .settings import Settings

if TYPE_CHECKING:
    from google.auth.credentials import Credentials
    from google.cloud.aiplatform_v1.services.endpoint_service import EndpointServiceClient
    from google.cloud.aiplatform_v1.services.model_service import ModelServiceClient

T = TypeVar("T")

CALL_SECONDS: Final = 60.0
FIRST_PAUSE, LONGEST_PAUSE = 0.2, 10.0
TRIES: Final = 10  # of one call, about a minute in all


# --- errors -------------------------------------------------------------------------------------------------


class RefusedError(ProblemError):
    """Vertex AI answered with an error. `status` is Google's name of it, such as NOT_FOUND."""

    def __init__(self, status: str, message: str) -> None:
        super().__init__(message)
        self.status = status


class PassingError(ProblemError):
    """429, 503 or a dropped connection: the call may or may not have arrived. Look before repeating it."""


class StoppedError(ProblemError):
    """Ctrl-C."""


class TimedOutError(ProblemError):
    """The resource's timeout is over."""


class HalfMadeError(ProblemError):
    """The resource is there, but not as wanted: Pulumi keeps it, and the next update goes on from there."""

    def __init__(self, message: str, id_: str, outputs: Wire) -> None:
        super().__init__(message)
        self.id, self.outputs = id_, outputs


@dataclass(frozen=True)
class Wait:
    """A refusal that passes by itself: by what it is known, how long it is waited out, and who says so."""

    status: frozenset[str]
    text: str
    seconds: float
    why: str
    source: str


WAITED_OUT: Final = (
    Wait(
        frozenset({"PERMISSION_DENIED"}),
        "has not been used in project",
        300,
        "the Vertex AI API was enabled a moment ago",
        "the answer itself: 'If you enabled this API recently, wait a few minutes'",
    ),
    Wait(
        frozenset({"FAILED_PRECONDITION"}),
        "Service agents are being provisioned",
        600,
        "Google is making the Vertex AI service agent of this project",
        "the answer itself, and https://cloud.google.com/vertex-ai/docs/general/access-control#service-agents",
    ),
    Wait(
        frozenset({"FAILED_PRECONDITION"}),
        "other operations running",
        600,
        "another operation is running there",
        "Vertex AI's words for a RagCorpus; for models and endpoints they are assumed",
    ),
    Wait(
        frozenset({"ABORTED"}),
        "",
        600,
        "somebody else changed it at the same time",
        "https://google.aip.dev/193 and google.rpc.Code: ABORTED is to be tried again from the reading on",
    ),
)
HELD_AFTER_UNDEPLOY: Final = Wait(
    frozenset({"FAILED_PRECONDITION", "INVALID_ARGUMENT"}),
    "deployed",
    180,
    "it is still held by the endpoint that it was undeployed from",
    "https://github.com/googleapis/python-aiplatform/issues/2807",
)


# --- work ---------------------------------------------------------------------------------------------------


@dataclass
class Work:
    """What one call of the engine may use: how long it has, whom it tells, and when it must stop."""

    urn: str
    seconds: float
    stop: threading.Event
    say: Callable[[str], None] = lambda _: None  # the status line of the resource
    log: Callable[[str], None] = lambda _: None  # a line that stays
    started: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.started)

    def check(self) -> None:
        if self.stop.is_set():
            raise StoppedError(
                "Stopped. What is running on Vertex AI goes on; the next `pulumi up` continues from there."
            )
        if self.left <= 0:
            raise TimedOutError(
                f"Not done within {duration(self.seconds)}. If it only needs longer, set "
                "opts=pulumi.ResourceOptions(custom_timeouts=…)."
            )

    def pause(self, seconds: float) -> None:
        self.check()
        self.stop.wait(max(0.01, min(seconds, self.left)))
        self.check()

    def settle(self, seconds: float) -> Work:
        """The same work with time to tidy up after a failure, however much of its own time is gone."""
        return Work(self.urn, seconds, self.stop, self.say, self.log)


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes and rest else f"{minutes} min" if minutes else f"{rest} s"


def pauses() -> Iterator[float]:
    """Growing pauses: 0.2 s at first, 10 s at most."""
    pause = FIRST_PAUSE
    while True:
        yield pause
        pause = min(pause * 1.6, LONGEST_PAUSE)


def converge(work: Work, step: Callable[[], bool], also: tuple[Wait, ...] = ()) -> None:
    """Calls `step` until it says that nothing is left to do.

    Each call looks at what is there first, so it is safe after any failure: passing faults are tried again with growing
    pauses, the refusals of WAITED_OUT (and `also`) are waited out, everything else is raised at once.
    """
    faults, delays = 0, pauses()
    refused: dict[Wait, float] = {}
    while True:
        work.check()
        try:
            if step():
                return
        except PassingError:
            faults += 1
            if faults >= TRIES:
                raise
        except RefusedError as error:
            waits = (w for w in (*also, *WAITED_OUT) if error.status in w.status and w.text in str(error))
            wait = next(waits, None)
            if wait is None or time.monotonic() - refused.setdefault(wait, time.monotonic()) > wait.seconds:
                raise
            work.say(f"waiting: {wait.why}")
        else:
            faults, delays = 0, pauses()
            continue
        work.pause(next(delays))


# --- calls ------------------------------------------------------------------------------------------------


def import_lightly() -> None:
    """Lets the clients of two services be imported without the 34 others.

    The package's `__init__` imports every service of Vertex AI, which takes 3.2 s of processor time here; without it
    the two take 1.0 s. To be called before the first import, in a process that needs no more of the package.
    """
    name = "google.cloud.aiplatform_v1"
    found = importlib.util.find_spec(name)
    if found is not None and name not in sys.modules:
        package = ModuleType(name)
        package.__path__ = list(found.submodule_search_locations or [])
        sys.modules[name] = package


@dataclass
class Api:
    """One project and location on Vertex AI."""

    settings: Settings
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _locks: dict[str, threading.Lock] = field(default_factory=dict)

    @property
    def parent(self) -> str:
        return f"projects/{self.settings.project}/locations/{self.settings.location}"

    def lock(self, name: str) -> threading.Lock:
        """One lock for each model and endpoint: mutations of one are done one after the other."""
        with self._lock:
            return self._locks.setdefault(name, threading.Lock())

    @cached_property
    def _credentials(self) -> Credentials:
        return self.settings.authorize()

    @cached_property
    def models(self) -> ModelServiceClient:
        from google.cloud.aiplatform_v1.services.model_service import ModelServiceClient

        return ModelServiceClient(
            credentials=self._credentials,
            transport="rest",
            client_options={"api_endpoint": self.settings.url},
        )

    @cached_property
    def endpoints(self) -> EndpointServiceClient:
        from google.cloud.aiplatform_v1.services.endpoint_service import EndpointServiceClient

        return EndpointServiceClient(
            credentials=self._credentials,
            transport="rest",
            client_options={"api_endpoint": self.settings.url},
        )

    @cached_property
    def _session(self) -> Any:
        from google.auth.transport.requests import AuthorizedSession

        return AuthorizedSession(self._credentials)  # type: ignore[no-untyped-call]

    def call(self, method: Callable[..., T], request: Any) -> T:
        """One call, once. Raises RefusedError, or PassingError where it may pass.

        A call that changes something is never repeated blindly: `converge` looks first whether it arrived.
        """
        return self._translated(lambda: method(request=request, timeout=CALL_SECONDS, retry=None))

    def read(self, work: Work, method: Callable[..., Any], request: Any) -> Any:
        """A call that changes nothing, repeated while the fault may pass. A paged answer comes as a list."""

        def once() -> Any:
            answer = method(request=request, timeout=CALL_SECONDS, retry=None)
            return list(answer) if hasattr(answer, "pages") else answer

        return self._patiently(work, once)

    def _patiently(self, work: Work, once: Callable[[], T]) -> T:
        delays = pauses()
        for attempt in range(TRIES):
            work.check()
            try:
                return self._translated(once)
            except PassingError:
                if attempt == TRIES - 1:
                    raise
                work.pause(next(delays))
        raise AssertionError

    def _translated(self, call: Callable[[], T]) -> T:
        """Google's and the network's exceptions as ours."""
        import requests
        from google.api_core import exceptions
        from google.auth import exceptions as auth_exceptions

        try:
            return call()
        except exceptions.GoogleAPICallError as error:
            status, said = google_error(error)
            message = f"Vertex AI answered {error.code} {status}: {said}"
            # A quota that is used up answers 429 too, and trying again does not help it.
            rate_limited = error.code == 429 and "quotas are exceeded" not in str(error.message)
            if rate_limited or error.code in (502, 503, 504):
                raise PassingError(message) from None
            raise RefusedError(status, message) from None
        except auth_exceptions.RefreshError as error:
            raise ProblemError(
                f"Google did not accept the credentials: {error}. Run `gcloud auth application-default login`."
            ) from None
        except (requests.RequestException, auth_exceptions.TransportError) as error:
            raise PassingError(
                f"Vertex AI cannot be reached at {self.settings.url} ({type(error).__name__})."
            ) from None

    # Operations are read as plain JSON: the generated clients ask for them under /ui/, a path meant for the
    # console, and cannot parse one that was started through another version of the API, as the google
    # provider does.

    def _json(self, work: Work, method: str, path: str) -> Wire:
        from google.api_core import exceptions

        def once() -> Wire:
            answer = self._session.request(method, f"{self.settings.url}/v1/{path}", timeout=CALL_SECONDS)
            if answer.status_code >= 400:
                raise exceptions.from_http_response(answer)  # type: ignore[no-untyped-call]
            body: Wire = answer.json()
            return body

        return self._patiently(work, once)

    def running(self, work: Work, name: str) -> list[str]:
        """The names of the operations that are running on a model or endpoint; none if it does not exist."""
        names: list[str] = []
        page = ""
        while True:
            try:
                body = self._json(work, "GET", f"{name}/operations" + (f"?pageToken={page}" if page else ""))
            except RefusedError as error:
                if error.status == "NOT_FOUND":
                    return names
                raise
            names += [str(o["name"]) for o in body.get("operations", []) if not o.get("done")]
            page = str(body.get("nextPageToken") or "")
            if not page:
                return names

    def wait(self, work: Work, operation: str, what: str) -> Wire:
        """Waits until an operation is done and returns its response; raises RefusedError when it failed."""
        delays, began = pauses(), time.monotonic()
        while True:
            body = self._json(work, "GET", operation)
            if body.get("done"):
                break
            work.say(f"{what} ({duration(time.monotonic() - began)})")
            work.pause(next(delays))
        if error := body.get("error"):
            raise RefusedError(rpc_status(int(error.get("code", 2))), str(error.get("message", "no reason given")))
        response: Wire = body.get("response", {})
        return response

    def wait_for_others(self, work: Work, name: str) -> None:
        """Waits for whatever is running on a model or endpoint, be it our own work of a run that was killed.

        How it ended is not told by the operation's kind alone, so its outcome is not used: look again afterwards.
        """
        for operation in self.running(work, name):
            try:
                self.wait(work, operation, "waiting for an operation that was already running")
            except RefusedError:
                continue

    def cancel(self, work: Work, operation: str) -> None:
        """Asks an operation to stop. Vertex AI may finish it all the same."""
        self._json(work, "POST", f"{operation}:cancel")


def google_error(error: Any) -> tuple[str, str]:
    """Google's name of an error, such as FAILED_PRECONDITION, and its words, from the body of a REST answer.

    The exception's own text begins with the method and the whole address.
    """
    try:
        body = error.response.json()["error"]
        return str(body["status"]), str(body["message"])
    except (AttributeError, ValueError, KeyError, TypeError):
        name = error.grpc_status_code.name if error.grpc_status_code else "UNKNOWN"
        return name, str(error.message)


def rpc_status(code: int) -> str:
    """The name of a google.rpc.Code."""
    import grpc

    return next((s.name for s in grpc.StatusCode if s.value[0] == code), "UNKNOWN")
