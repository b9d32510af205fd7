"""Counting through an endpoint of Vertex AI, or of the sandbox; and what an endpoint serves."""

from __future__ import annotations

import base64
import io
import json
import re
import sys
from dataclasses import dataclass, replace
from typing import Any, Final

from headcount.counters import TIMEOUT, Answer, CountError, Patience, post
from headcount.credentials import Credentials
from headcount.stacks import StackError, outputs
from serving.contract import Parameters, Person
from serving.pictures import PictureError, annotate, upright

NAME: Final = r"projects/[^/]+/locations/([a-z0-9-]+)/endpoints/[^/]+"
# Request size limit, keyed by whether the endpoint is dedicated:
# https://cloud.google.com/vertex-ai/docs/predictions/choose-endpoint-type
MAX_REQUEST_BYTES: Final = {True: 10 * 2**20, False: 1_500_000}
LONGEST_SIDE = 2560  # pixels of a picture that is sent smaller for one look: the network sees 640
QUALITY = 90


@dataclass(frozen=True)
class Address:
    """Where an endpoint is asked. url: without `:predict`. max_bytes: the largest request."""

    url: str
    max_bytes: int

    @property
    def needs_token(self) -> bool:
        """Google's endpoints take Application Default Credentials; the sandbox, on plain HTTP, takes none."""
        return self.url.startswith("https://")


def of_stack(stack: str) -> Address:
    """The address of a stack's endpoint. Raises CountError."""
    try:
        found = outputs(stack)
    except StackError as error:
        raise CountError(str(error)) from None
    return Address(str(found["url"]), int(found["maxRequestBytes"]))


def of_name(endpoint: str) -> Address:
    """The address of an endpoint by its resource name (projects/…/locations/…/endpoints/…) or its URL.

    Raises CountError, and ValueError for a text that is neither.
    """
    if match := re.fullmatch(rf"https?://[^/]+/v1(?:beta1)?/{NAME}", endpoint):
        return Address(endpoint, MAX_REQUEST_BYTES[".prediction.vertexai.goog/" in endpoint])
    if not (match := re.fullmatch(NAME, endpoint)):
        raise ValueError(
            f"{endpoint!r} is not an endpoint; give projects/PROJECT/locations/REGION/endpoints/ID, or its URL"
        )
    regional = f"https://{match[1]}-aiplatform.googleapis.com/v1/{endpoint}"
    found = describe(regional)
    if not found.get("dedicatedEndpointEnabled"):
        return Address(regional, MAX_REQUEST_BYTES[False])
    if not (dns := str(found.get("dedicatedEndpointDns") or "").removeprefix("https://")):
        raise CountError(f"{endpoint} has no DNS name yet: it gets one with its first deployment")
    return Address(f"https://{dns}/v1/{endpoint}", MAX_REQUEST_BYTES[True])


def describe(url: str) -> dict[str, Any]:
    """What Vertex AI says of an endpoint. url: its own, on the region's host. Raises CountError."""
    import httpx

    headers = Credentials().header() if url.startswith("https://") else {}
    try:
        answer = httpx.get(url, headers=headers, timeout=30, trust_env=url.startswith("https://"))
        content = answer.json()
    except (httpx.TransportError, ValueError) as error:
        raise CountError(f"{url} does not answer: {error}") from None
    if answer.status_code != 200:
        raise CountError(f"{url} answers {answer.status_code}: {content.get('error', {}).get('message', '')}")
    return dict(content)


class Endpoint:
    """Asks an endpoint, on Google Cloud with Application Default Credentials. Raises CountError.

    A picture over the endpoint's payload limit is sent smaller, and its answer's note says so; boxes are those of the
    original. The annotated picture is drawn here, because an answer has the same limit.
    """

    parallel = 4

    def __init__(self, address: Address) -> None:
        import httpx

        self._url = httpx.URL(f"{address.url}:predict")
        self._room = address.max_bytes
        self._credentials = Credentials() if address.needs_token else None
        self._http = httpx.Client(timeout=httpx.Timeout(TIMEOUT, connect=10))
        self._patience = Patience()

    @property
    def largest_picture(self) -> int:
        """Bytes of a picture that is sent as it is, with parameters of 1,000 bytes."""
        return (self._room - 1200) * 3 // 4

    def count(self, data: bytes, parameters: Parameters) -> Answer:
        return self.counted_by(data, parameters)[0]

    def counted_by(self, data: bytes, parameters: Parameters) -> tuple[Answer, str]:
        """The answer, and the id of the deployed model that gave it."""
        given = replace(parameters, annotate=False).as_json()
        try:
            sent = fit(data, self._room - len(json.dumps(given)) - 200, longest_side(parameters.detail))
            answer, model = self._patience.ask(lambda: self._ask(sent.data, given))
            answer = sent.back(answer, self._room)
            if parameters.annotate:
                boxes, labels = [p.box for p in answer.people], [f"{p.confidence:.2f}" for p in answer.people]
                answer = replace(answer, annotated=annotate(data, boxes, labels, parameters.region))
        except PictureError as error:
            raise CountError(str(error)) from None
        return answer, model

    @property
    def largest_request(self) -> int:
        """Bytes of the instances of a request."""
        return self._room - 200

    def predict(self, instances: list[Any]) -> list[Any]:
        """The answers of an exported model, one for each instance."""
        return self.predicted_by(instances)[0]

    def predicted_by(self, instances: list[Any]) -> tuple[list[Any], str]:
        """The answers, and the id of the deployed model that gave them."""
        return self._patience.ask(lambda: self._predictions({"instances": instances}))

    def close(self) -> None:
        self._http.close()

    def _ask(self, data: bytes, given: dict[str, Any]) -> tuple[Answer, str]:
        instance = {"image": {"b64": base64.b64encode(data).decode()}}
        found, model = self._predictions({"instances": [instance], "parameters": given})
        return Answer.from_json(found[0]), model

    def _predictions(self, body: dict[str, Any]) -> tuple[list[Any], str]:
        headers = self._credentials.header() if self._credentials else {}
        content = post(self._http, self._url, headers=headers, json=body)
        found = predictions(content, len(body["instances"]))
        return found, str(content.get("deployedModelId", ""))


def predictions(content: Any, wanted: int) -> list[Any]:
    """The predictions of an answer, as many as are wanted. Raises CountError."""
    found = content.get("predictions") if isinstance(content, dict) else None
    if not isinstance(found, list) or len(found) != wanted:
        raise CountError("the answer has not a prediction for each instance; is it Headcount's model?")
    return found


@dataclass(frozen=True)
class Fitted:
    """A picture as it is sent. scale: sent over original pixels; size: (width, height), where it was made smaller."""

    data: bytes
    scale: float = 1.0
    size: tuple[int, int] | None = None
    original: tuple[int, int] | None = None

    def back(self, answer: Answer, room: int) -> Answer:
        """The answer in the original picture's pixels."""
        if self.size is None or self.original is None:
            return answer

        def enlarged(people: list[Person]) -> list[Person]:
            sides = ([round(side / self.scale, 1) for side in p.box] for p in people)
            return [Person((a, b, c, d), p.confidence) for (a, b, c, d), p in zip(sides, people, strict=True)]

        people = enlarged(answer.people)
        candidates = None if answer.candidates is None else enlarged(answer.candidates)
        note = f"sent at {self.size[0]}x{self.size[1]}: the endpoint takes {room / 1e6:.3g} MB a request"
        note = "; ".join(filter(None, (note, answer.note)))
        width, height = self.original
        return replace(answer, people=people, candidates=candidates, width=width, height=height, note=note)


def longest_side(detail: str) -> int:
    """Pixels of the longer side that a picture has at most, if it must be sent smaller."""
    return LONGEST_SIDE if detail == "fast" else sys.maxsize


def fit(data: bytes, room: int, longest: int) -> Fitted:
    """The picture, made smaller if its base64 needs more than room bytes, and then at most longest pixels a side.

    Raises PictureError.
    """
    if len(data) * 4 / 3 <= room:
        return Fitted(data)
    from PIL import Image

    picture = Image.fromarray(upright(data))
    original, side = picture.size, min(longest, max(picture.size))
    while True:
        scale = side / max(original)
        size = (max(1, round(original[0] * scale)), max(1, round(original[1] * scale)))
        out = io.BytesIO()
        picture.resize(size).save(out, "JPEG", quality=QUALITY)
        if out.tell() * 4 / 3 <= room or side < 64:
            return Fitted(out.getvalue(), scale, size, original)
        side = side * 4 // 5
