"""Counters of the people in one picture: in this process, over REST and over gRPC. endpoint.py has Vertex AI's.

torch, httpx and grpc are imported where they are used: a client of a server needs no torch.
"""

from __future__ import annotations

import base64
import json
import logging
import os
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from serving.contract import PREDICT_ROUTE, Limits, Parameters, Person

if TYPE_CHECKING:
    import grpc
    import httpx

TIMEOUT = 60.0  # seconds for one answer; Vertex AI's shared endpoints give no more
PAUSES = (0.5, 1.0, 2.0, 4.0)  # seconds before each further try, unless the server names a longer one
# What Vertex AI answers, with 429, for a model that is scaled to zero; finding a machine takes minutes.
COLD = "not yet ready for inference"
COLD_SECONDS, COLD_PAUSE = 1800.0, 5.0
LONGEST_PAUSE = 30.0  # of those a server may name


log = logging.getLogger("headcount")
T = TypeVar("T")


class CountError(Exception):
    """A picture that was not counted; the message says why and what would do."""


@dataclass(frozen=True)
class Answer:
    """The people in one picture.

    people: most confident first, at most max_people of them; count is of all. width, height: of the upright
    picture in pixels. looks: times that the network looked at the picture or a part of it. model: its name and version.
    grid: if asked, the number of people in each cell, row by row from the top. candidates: if asked, those who are less
    confident and do not count. annotated: if asked, a JPEG with the boxes drawn. note: what the caller should know of
    how it was counted.
    """

    count: int
    people: list[Person]
    width: int
    height: int
    model: dict[str, str] = field(default_factory=dict)
    looks: int = 1
    grid: list[list[int]] | None = None
    candidates: list[Person] | None = None
    annotated: bytes | None = field(default=None, repr=False)
    note: str = ""

    @classmethod
    def from_json(cls, content: Any) -> Answer:
        """From the object the serving contract describes. Raises CountError if it is an error or no such."""
        try:
            if "error" in content:
                raise CountError(str(content["error"]["message"]))
            annotated, grid, candidates = (content.get(name) for name in ("annotated", "grid", "candidates"))
            return cls(
                int(content["count"]),
                _people(content["people"]),
                int(content["image"]["width"]),
                int(content["image"]["height"]),
                dict(content["model"]),
                int(content.get("looks", 1)),  # servers of earlier versions do not say
                [[int(cell) for cell in row] for row in grid] if grid else None,
                None if candidates is None else _people(candidates),
                base64.b64decode(annotated["b64"]) if annotated else None,
                str(content.get("note", "")),
            )
        except (KeyError, TypeError, ValueError, AttributeError):
            raise CountError(f"the answer is not Headcount's: {_start(repr(content))}; check the address") from None

    def as_json(self) -> dict[str, Any]:
        """As the serving contract writes it, without the annotated picture."""
        answer: dict[str, Any] = {
            "count": self.count,
            "people": [person.as_json() for person in self.people],
            "image": {"width": self.width, "height": self.height},
            "looks": self.looks,
            "model": self.model,
        }
        if self.grid:
            answer["grid"] = self.grid
        if self.candidates is not None:
            answer["candidates"] = [person.as_json() for person in self.candidates]
        return answer | ({"note": self.note} if self.note else {})


class Counter(Protocol):
    """Counts in one picture, from as many as `parallel` threads at once."""

    parallel: int

    def count(self, data: bytes, parameters: Parameters) -> Answer:
        """Raises CountError."""

    def close(self) -> None: ...


class InProcess:
    """Counts here, with the server's own detector.

    checkpoint: a YOLOv5 .pt file. parallel: more than one makes torch use one thread for each picture, in all
    of this process: two pictures side by side on two cores take half the time of one after the other on both.
    """

    def __init__(self, checkpoint: Path, parallel: int = 1) -> None:
        try:
            import cv2
            import torch

            from serving.detector import Detector
            from serving.network import CheckpointError
        except ImportError as error:
            raise CountError(
                f"counting without a server needs {error.name}, which is not installed; "
                "install requirements/torch.txt, or name a server"
            ) from None
        self.parallel = parallel
        if parallel > 1:
            torch.set_num_threads(1)
            cv2.setNumThreads(1)
        self._limits = _limits()
        try:
            self._detector = Detector(checkpoint, os.environ.get("HEADCOUNT_CLASS") or "person")
        except CheckpointError as error:
            raise CountError(str(error)) from None

    def count(self, data: bytes, parameters: Parameters) -> Answer:
        from serving.looks import Budget
        from serving.pictures import PictureError
        from serving.request_state import annotate_count

        try:
            picture = self._detector.prepare(data, self._limits, parameters)
            (first,) = self._detector.count([picture], [parameters])
            found = self._detector.look_closer(picture, first, parameters, Budget(self._limits.looks))
            answer = Answer.from_json(found.as_json(parameters, self._detector.model))
            if parameters.annotate:
                drawn = annotate_count(data, found, parameters, self._limits)
                answer = replace(answer, annotated=drawn)
        except PictureError as error:
            raise CountError(str(error)) from None
        return answer

    def close(self) -> None:
        pass


class Rest:
    """Posts a picture's bytes to a server. url: its address, with or without the route. Raises ValueError."""

    parallel = 4

    def __init__(self, url: str) -> None:
        import httpx

        address = server_url(url)
        path = address.path.rstrip("/")
        self._url = address.copy_with(path=path if path.endswith(PREDICT_ROUTE) else path + PREDICT_ROUTE)
        self._http = httpx.Client(timeout=httpx.Timeout(TIMEOUT, connect=10))
        self._patience = Patience()

    def count(self, data: bytes, parameters: Parameters) -> Answer:
        return self._patience.ask(lambda: self._ask(data, parameters))

    def close(self) -> None:
        self._http.close()

    def _ask(self, data: bytes, parameters: Parameters) -> Answer:
        headers = {"Content-Type": "application/octet-stream", "Accept": "application/json"}
        url = self._url.copy_merge_params(parameters.as_query())
        return Answer.from_json(post(self._http, url, headers=headers, content=data))


def server_url(url: str) -> httpx.URL:
    """Raises ValueError for a text that is no URL of a server."""
    import httpx

    try:
        address = httpx.URL(url)
    except httpx.InvalidURL:
        address = httpx.URL()
    if address.scheme not in ("http", "https") or not address.host:
        raise ValueError(f"{url!r} is not a server's URL; give one such as http://localhost:8080")
    return address


def post(http: httpx.Client, url: httpx.URL, **request: Any) -> Any:
    """The JSON that a server answers. Raises CountError; of its kind for Patience where asking again may help."""
    import httpx

    place = f"{url.scheme}://{url.netloc.decode()}"
    try:
        response = http.post(url, **request)
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        reason = str(error) or "no answer"
        raise _UnreachableError(f"cannot reach {place}: {reason}; is the server up?") from None
    except httpx.TimeoutException:
        raise CountError(f"{place} gave no answer within {TIMEOUT:g} seconds") from None
    except httpx.TransportError as error:
        raise _AgainError(f"{place} broke off the connection: {error}") from None
    try:
        content = response.json()
    except ValueError:
        content = None
    if response.status_code == 200 and content is not None:
        return content
    message = _error_message(content) or (
        f"{place} answered HTTP {response.status_code} and not as Headcount does: "
        f"{_start(response.text)!r}; check the address"
    )
    if response.status_code == 429 and COLD in message:
        raise _ColdError(message)
    if response.status_code in (429, 503):
        raise _AgainError(message, _retry_after(response))
    raise CountError(message)


class Grpc:
    """Asks TorchServe's own gRPC service, without TLS. address: HOST:PORT. Raises ValueError."""

    parallel = 4

    def __init__(self, address: str) -> None:
        if not re.fullmatch(r"[^/\s]+:\d{1,5}", address):
            raise ValueError(f"{address!r} is not a gRPC address; give HOST:PORT, such as localhost:7070")
        import grpc

        from headcount.torchserve_grpc import METHOD, PredictionResponse, PredictionsRequest

        self._request = PredictionsRequest
        # The server has its limit; grpc's own of 4 MB for answers would refuse annotated pictures.
        unlimited = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
        self._address, self._channel = address, grpc.insecure_channel(address, unlimited)
        self._predict = self._channel.unary_unary(
            METHOD, PredictionsRequest.SerializeToString, PredictionResponse.FromString
        )
        self._patience = Patience()

    def count(self, data: bytes, parameters: Parameters) -> Answer:
        texts = {name: text.encode() for name, text in parameters.as_query().items()}
        request = self._request(model_name="people", input={"data": data, **texts})
        return self._patience.ask(lambda: self._ask(request))

    def close(self) -> None:
        self._channel.close()

    def _ask(self, request: Any) -> Answer:
        import grpc

        try:
            response = self._predict(request, timeout=TIMEOUT)
        except grpc.RpcError as error:
            raise self._explained(error) from None
        try:
            content = json.loads(response.prediction)
        except ValueError:
            raise CountError(
                f"the answer of {self._address} is not Headcount's: {_start(repr(response.prediction))}"
            ) from None
        if (message := _error_message(content)) and content["error"].get("code") in (429, 503):
            raise _AgainError(message)
        return Answer.from_json(content)

    def _explained(self, error: grpc.RpcError) -> Exception:
        import grpc

        code, details = error.code(), str(error.details())
        if code is grpc.StatusCode.UNAVAILABLE and "connect" in details.lower():
            return _UnreachableError(f"cannot reach {self._address}: {details}; is the server up?")
        # The status of a message that is too large is that of a full queue.
        if code is grpc.StatusCode.UNAVAILABLE or (
            code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than" not in details
        ):
            return _AgainError(details)
        if code is grpc.StatusCode.CANCELLED:  # how TorchServe refuses a body over its limit
            details += "; perhaps the picture is larger than the server accepts"
        return CountError(f"{self._address} answered {code.name}: {details}")


class _AgainError(CountError):
    """Worth asking again. after: the seconds the server asks for."""

    def __init__(self, message: str, after: float = 0) -> None:
        super().__init__(message)
        self.after = after


class _ColdError(_AgainError):
    """The model is scaled to zero and comes up now."""


class _UnreachableError(_AgainError):
    """There is no server at the address."""


class Patience:
    """Asks again, a few times, where that may help; no more at all once the server was found unreachable."""

    def __init__(self) -> None:
        self._unreachable = ""

    def ask(self, once: Callable[[], T]) -> T:
        for pause in (*PAUSES, None):
            if self._unreachable:
                break
            try:
                return self._warm(once)
            except _AgainError as error:
                if pause is None:
                    if isinstance(error, _UnreachableError):
                        self._unreachable = str(error)
                    raise CountError(str(error)) from None
                # At random, so that many clients that were refused together do not come back together.
                time.sleep(max(min(error.after, LONGEST_PAUSE), random.uniform(pause / 2, pause)))
        raise CountError(self._unreachable)

    def _warm(self, once: Callable[[], T]) -> T:
        """The answer, also of a model that has to come up from zero first."""
        deadline, told = time.monotonic() + COLD_SECONDS, False
        while True:
            try:
                return once()
            except _ColdError as error:
                if time.monotonic() > deadline:
                    raise CountError(
                        f"the model did not come up within {COLD_SECONDS / 60:g} minutes: {error}"
                    ) from None
                if not told:
                    log.warning(
                        "The model is scaled to zero. Waiting until it is up, %g minutes at most.", COLD_SECONDS / 60
                    )
                told = True
                time.sleep(COLD_PAUSE)


def _limits() -> Limits:
    try:
        return Limits.from_environment()
    except ValueError as error:
        raise CountError(str(error)) from None


def _people(content: Any) -> list[Person]:
    return [Person(_box(person["box"]), float(person["confidence"])) for person in content]


def _box(values: Any) -> tuple[float, float, float, float]:
    left, top, right, bottom = values
    return float(left), float(top), float(right), float(bottom)


def _error_message(content: Any) -> str | None:
    error = content.get("error") if isinstance(content, dict) else None
    message = error.get("message") if isinstance(error, dict) else None
    if not isinstance(message, str):
        return None
    try:  # Vertex AI passes the body of a container's error on as the message
        return _error_message(json.loads(message)) or message
    except (ValueError, RecursionError):
        return message


def _retry_after(response: httpx.Response) -> float:
    """Seconds, of either form of the header (RFC 9110, 10.2.3); 0 where there is none."""
    text = response.headers.get("Retry-After", "")
    if text.isascii() and text.isdigit():
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return 0


def _start(text: str) -> str:
    return text if len(text) <= 120 else text[:119] + "…"
