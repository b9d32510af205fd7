"""Counting through a stack's endpoint on Vertex AI, or in the sandbox."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
from dataclasses import dataclass, replace
from typing import Any

from headcount.counters import TIMEOUT, Answer, CountError, Patience, Person, post
from serving.contract import Parameters
from serving.pictures import PictureError, annotate, upright

SCOPE = "https://www.googleapis.com/auth/cloud-platform"
LONGEST_SIDE = 2560  # pixels of a picture that is sent smaller: the network sees 640
QUALITY = 90


class Stack:
    """Asks the endpoint of a Pulumi stack, with Application Default Credentials. Raises CountError.

    A picture over the endpoint's payload limit is sent smaller, and its answer's note says so; boxes are those of the
    original. The annotated picture is drawn here, since an answer has the same limit.
    """

    parallel = 4

    def __init__(self, stack: str) -> None:
        import httpx

        # infra is asked as a program: nothing here depends on it, or on Pulumi.
        told = subprocess.run(
            [sys.executable, "-m", "infra.stacks", "endpoint", stack], check=False, capture_output=True, text=True
        )
        if told.returncode:
            raise CountError(told.stderr.strip().rpartition("\n")[2])
        where = json.loads(told.stdout)
        self._url = httpx.URL(f"{where['url']}:predict")
        self._room = where["max_bytes"]
        self._credentials = _Credentials() if where["needs_token"] else None
        self._http = httpx.Client(timeout=httpx.Timeout(TIMEOUT, connect=10))
        self._patience = Patience()

    def count(self, data: bytes, parameters: Parameters) -> Answer:
        given = {name: json.loads(text) for name, text in replace(parameters, annotate=False).as_query().items()}
        try:
            sent = fit(data, self._room - len(json.dumps(given)) - 200)
            answer = self._patience.ask(lambda: self._ask(sent.data, given))
            answer = sent.back(answer, self._room)
            if parameters.annotate:
                boxes, labels = [p.box for p in answer.people], [f"{p.confidence:.2f}" for p in answer.people]
                answer = replace(answer, annotated=annotate(data, boxes, labels, parameters.region))
        except PictureError as error:
            raise CountError(str(error)) from None
        return answer

    def close(self) -> None:
        self._http.close()

    def _ask(self, data: bytes, given: dict[str, Any]) -> Answer:
        headers = {"Authorization": f"Bearer {self._credentials.token()}"} if self._credentials else {}
        body = {"instances": [{"image": {"b64": base64.b64encode(data).decode()}}], "parameters": given}
        content = post(self._http, self._url, headers=headers, json=body)
        try:
            return Answer.from_json(content["predictions"][0])
        except (KeyError, IndexError, TypeError):
            raise CountError("the endpoint's answer has no prediction; is it Headcount's model?") from None


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
        people = [
            Person(tuple(round(side / self.scale, 1) for side in p.box), p.confidence)  # type: ignore[arg-type]
            for p in answer.people
        ]
        note = f"sent at {self.size[0]}x{self.size[1]}: the endpoint takes {room / 1e6:.3g} MB a request"
        return replace(answer, people=people, width=self.original[0], height=self.original[1], note=note)


def fit(data: bytes, room: int) -> Fitted:
    """The picture, made smaller if its base64 needs more than room bytes. Raises PictureError."""
    if len(data) * 4 / 3 <= room:
        return Fitted(data)
    from PIL import Image

    picture = Image.fromarray(upright(data))
    original, side = picture.size, min(LONGEST_SIDE, max(picture.size))
    while True:
        scale = side / max(original)
        size = (max(1, round(original[0] * scale)), max(1, round(original[1] * scale)))
        out = io.BytesIO()
        picture.resize(size).save(out, "JPEG", quality=QUALITY)
        if out.tell() * 4 / 3 <= room or side < 64:
            return Fitted(out.getvalue(), scale, size, original)
        side = side * 4 // 5


class _Credentials:
    """Application Default Credentials, renewed when they run out."""

    def __init__(self) -> None:
        try:
            import google.auth
            import google.auth.exceptions
            import google.auth.transport.requests
        except ImportError as error:
            raise CountError(f"an endpoint on Google Cloud needs {error.name}; run `make test` or install it") from None
        try:
            self._credentials, _ = google.auth.default(scopes=[SCOPE])
        except google.auth.exceptions.DefaultCredentialsError:
            raise CountError("no Google credentials: run `gcloud auth application-default login`") from None
        self._request = google.auth.transport.requests.Request()

    def token(self) -> str:
        import google.auth.exceptions

        if not self._credentials.valid:
            try:
                self._credentials.refresh(self._request)  # type: ignore[no-untyped-call]
            except google.auth.exceptions.GoogleAuthError as error:
                raise CountError(
                    f"the Google credentials are refused ({error}): run `gcloud auth application-default login`"
                ) from None
        return str(self._credentials.token)
