"""Where an exported model predicts: in this process, on a server, on an endpoint."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from headcount.counters import TIMEOUT, CountError, Patience, post, server_url
from serving.contract import Limits

TOGETHER = 100  # instances of a request: below the limit that a server has by default


class Predictor(Protocol):
    """Predicts for a request's instances."""

    @property
    def largest_request(self) -> int:
        """Bytes of the instances of a request."""

    def predict(self, instances: list[Any]) -> list[Any]:
        """A prediction for each instance, or an object with `error` in its place. Raises CountError."""

    def close(self) -> None: ...


class LocalModel:
    """Predicts in this process with the model of a folder. Raises CountError for one that cannot be served."""

    largest_request = Limits.request_bytes

    def __init__(self, folder: Path) -> None:
        try:
            from serving.exported.model import ExportedModel
            from serving.exported.model_contract import ContractError
            from serving.exported.program import ProgramError
        except ImportError as error:
            raise CountError(
                f"predicting without a server needs {error.name}, which is not installed; "
                "install requirements/torch.txt, or name a server"
            ) from None
        try:
            self._model = ExportedModel(folder)
        except (ContractError, ProgramError) as error:
            raise CountError(str(error)) from None
        self.contract = self._model.contract

    def predict(self, instances: list[Any]) -> list[Any]:
        answers = self._model.predict(instances)
        return [{"error": {"message": str(one)}} if isinstance(one, Exception) else one for one in answers]

    def close(self) -> None:
        pass


class Server:
    """Asks a server of an exported model. url: its address, with or without the route. Raises ValueError."""

    largest_request = Limits.request_bytes - 200

    def __init__(self, url: str) -> None:
        import httpx

        self._url = server_url(url)
        self._http = httpx.Client(timeout=httpx.Timeout(TIMEOUT, connect=10))
        self._patience = Patience()

    def predict(self, instances: list[Any]) -> list[Any]:
        from headcount.endpoint import predictions

        def ask() -> list[Any]:
            return predictions(post(self._http, self._url, json={"instances": instances}), len(instances))

        if self._url.path in ("", "/"):
            self._url = self._url.copy_with(path=self._route())
        return self._patience.ask(ask)

    def close(self) -> None:
        self._http.close()

    def _route(self) -> str:
        """The route that the server's own document names for predictions."""
        import httpx

        try:
            paths = self._http.get(self._url.copy_with(path="/openapi.json")).json()["paths"]
            return str(next(path for path, operations in paths.items() if "post" in operations))
        except httpx.TransportError as error:
            raise CountError(f"cannot reach {self._url}: {error}; is the server up?") from None
        except (ValueError, KeyError, TypeError, AttributeError, StopIteration):
            raise CountError(f"{self._url} is no Headcount server; give its URL with the route") from None


def batches(instances: Sequence[Any], most: int, room: int) -> Iterator[list[Any]]:
    """Splits instances into requests of at most `most` instances and `room` bytes. A larger instance is alone."""
    batch: list[Any] = []
    used = 0
    for instance in instances:
        size = len(json.dumps(instance)) + 2
        if batch and (len(batch) == most or used + size > room):
            yield batch
            batch, used = [], 0
        batch.append(instance)
        used += size
    if batch:
        yield batch


def predict_all(predictor: Predictor, instances: Sequence[Any]) -> Iterator[Any]:
    """An answer for each instance, as far as requests are answered. Raises CountError at the first that is not."""
    for batch in batches(instances, TOGETHER, predictor.largest_request):
        try:
            yield from predictor.predict(batch)
        except CountError as error:
            if not re.match(r"instances\[\d+\]: ", str(error)):
                raise
            # A server refuses a request if all its instances are wrong, and tells of the first of them.
            yield from (_alone(predictor, instance) for instance in batch)


def _alone(predictor: Predictor, instance: Any) -> Any:
    try:
        return predictor.predict([instance])[0]
    except CountError as error:
        return {"error": {"message": str(error)}}


def table(predictions: Sequence[Any]) -> str:
    """The table of `gcloud ai-platform predict`: a column for each key of a prediction, in the keys' order.

    Cells are written as that tool wrote them, which is Python's str(). A prediction that is an error has dashes.
    """
    good = [one for one in predictions if isinstance(one, dict) and "error" not in one]
    names = sorted(good[0]) if good else []
    rows = [[name.upper() for name in names]]
    rows += [[_cell(one.get(name)) if one in good else "-" for name in names] for one in predictions]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    return "\n".join(lines) + "\n" if names else ""


def _cell(value: Any) -> str:
    text = "" if value is None else str(value)
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)
