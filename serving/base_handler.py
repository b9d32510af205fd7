"""The part of a TorchServe handler that every model shares: set-up, requests of either kind, errors, signs of life.

A request arrives in one of two ways: from the front as a reference to a spooled body, or over gRPC as the bytes
themselves. TorchServe gives both in batches; a batch is longer than one only where there is a GPU.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import sys
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from serving.contract import Limits, RequestError
from serving.run_folder import RunFolder
from serving.spool import SPOOLED_NAME

logger = logging.getLogger("handler")


@dataclass(kw_only=True)
class RequestState:
    """One request on its way through a handler.

    error: the request failed as a whole. milliseconds: what each step took.
    """

    error: RequestError | None = None
    milliseconds: dict[str, float] = field(default_factory=dict)

    def spend(self, step: str, milliseconds: float) -> None:
        self.milliseconds[step] = self.milliseconds.get(step, 0) + milliseconds


class RawRequest(NamedTuple):
    """A request before it is parsed. data: its body. fields: further inputs of a request over gRPC."""

    data: bytes
    content_type: str = ""
    query: str = ""
    accept: str = ""
    fields: dict[str, str] = {}  # noqa: RUF012  # nobody changes it


class Reply(NamedTuple):
    """The answer to a request."""

    body: bytes
    content_type: str = "application/json"
    headers: dict[str, str] = {}  # noqa: RUF012  # nobody changes it


S = TypeVar("S", bound=RequestState)


class BaseHandler(ABC, Generic[S]):
    """Answers for TorchServe. One process has one handler and one thread of arithmetic.

    A model's handler has `state_type` and the four verbs: set_up, decode, predict, answer.
    """

    state_type: type[S]

    @abstractmethod
    def set_up(self, model: Path, folder: Path, gpu: int) -> dict[str, Any]:
        """Load the model, let it compute, and return what the launcher's log says of it.

        model: HEADCOUNT_MODEL, else the archive's folder, which is `folder`.
        """

    @abstractmethod
    def decode(self, raw: RawRequest) -> S:
        """Parse a request. Raises RequestError."""

    @abstractmethod
    def predict(self, states: list[S]) -> None:
        """Compute a batch of requests, and keep the sign of life fresh."""

    @abstractmethod
    def answer(self, state: S) -> Reply:
        """The answer to a request without an error. Raises RequestError."""

    def initialize(self, context: Any) -> None:
        """TorchServe's entry point: set up, and only then report this worker as alive."""
        # TorchServe's worker logs a line for every request and metric.
        logging.getLogger().setLevel(logging.WARNING)
        self.run_folder = RunFolder(Path(os.environ["HEADCOUNT_RUN_FOLDER"]))
        try:
            import torch

            torch.set_num_threads(1)  # one process a core beats threads: README.md, Why it is so
            self.limits = Limits.from_environment()
            folder = Path(context.system_properties["model_dir"])
            model = Path(os.environ.get("HEADCOUNT_MODEL") or folder)
            self.run_folder.register(self.set_up(model, folder, context.system_properties.get("gpu_id") or 0))
        except Exception as error:
            # The launcher ends the container with this as its last line.
            self.run_folder.fail(str(error) or repr(error))
            raise

    def handle(self, rows: list[dict[str, Any]], context: Any) -> list[bytes]:
        """TorchServe's entry point: one answer for each row, whatever is wrong with the others."""
        over_grpc = any("data" in row for row in rows)
        with self.run_folder.answering_grpc() if over_grpc else contextlib.nullcontext():
            states = [self._guarded(row) for row in rows]
            self.predict(states)
            return [self.encode(state, context, i) for i, state in enumerate(states)]

    def encode(self, state: S, context: Any, row: int) -> bytes:
        """The answer's bytes; status and headers go into TorchServe's context."""
        reply: Reply | None = None
        try:
            if state.error is None:
                reply = self.answer(state)
        except RequestError as error:
            state.error = error
        except Exception:
            logger.exception("encoding failed")
            state.error = RequestError("the server failed to write this answer", 500)
        if reply is None:
            assert state.error is not None
            context.set_response_status(state.error.code, "Refused", row)
            reply = Reply(as_json(state.error.as_json()))
        context.set_response_content_type(row, reply.content_type)
        timing = ", ".join(f"{stage};dur={spent:.2f}" for stage, spent in state.milliseconds.items())
        for name, value in {**reply.headers, "Server-Timing": timing}.items():
            context.set_response_header(row, name, value)
        return reply.body

    def _guarded(self, row: dict[str, Any]) -> S:
        began = time.perf_counter()
        try:
            state = self.decode(self._raw(row))
        except RequestError as error:
            return self.state_type(error=error)
        except Exception:
            logger.exception("decoding failed")
            return self.state_type(error=RequestError("the server failed to read this request", 500))
        state.spend("decode", (time.perf_counter() - began) * 1e3)
        return state

    def _raw(self, row: dict[str, Any]) -> RawRequest:
        told = row.get("body")
        if isinstance(told, bytes | bytearray) and "data" not in row:  # from the front
            return self._spooled(bytes(told))
        texts = {k: bytes(v).decode(errors="replace") for k, v in row.items() if k not in ("data", "body")}
        accept = texts.pop("accept", "")
        return RawRequest(bytes(row.get("data", b"")), accept=accept, fields=texts)

    def _spooled(self, told: bytes) -> RawRequest:
        try:
            said = json.loads(told)
            name, size = said["spooled"], said["size"]
            content_type, query, accept = said["content_type"], said["query"], said["accept"]
            if not re.fullmatch(SPOOLED_NAME, name):
                raise ValueError
        except (ValueError, KeyError, TypeError):
            raise RequestError("over gRPC, send the request's bytes, or JSON with instances, as 'data'") from None
        try:
            with (self.run_folder.spool / name).open("rb", 0) as file:
                return RawRequest(file.read(size), content_type, query, accept)
        except FileNotFoundError:
            raise RequestError("the front gave this request up before a worker was free", 503) from None


def as_json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


logger.addHandler(logging.StreamHandler(sys.stderr))
