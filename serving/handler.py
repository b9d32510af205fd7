"""The TorchServe handler: set up once, then decode, predict, encode.

A request arrives in one of two ways: from the front as a reference to a spooled body, or over gRPC as the bytes
themselves. TorchServe gives both in batches; a batch is longer than one only where there is a GPU.
"""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import os
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import simplejpeg
import torch
from PIL import Image

from serving.contract import COUNT_HEADER, Limits, Parameters, Request, RequestError, parse_request
from serving.detector import TOGETHER, Count, Detector, dtype_name
from serving.pictures import Letterbox, PictureError
from serving.request_state import Picture, RequestState, annotate_count
from serving.run_folder import RunFolder
from serving.spool import SPOOLED_NAME
from serving.storage import StorageError, read_object

logger = logging.getLogger("handler")
READERS = 8  # pictures of one request that are in memory together, read side by side if they lie in buckets


class PeopleHandler:
    """Counts people for TorchServe. One process has one handler and one thread of arithmetic."""

    def initialize(self, context: Any) -> None:
        """Set up: load the network, run a picture through it, and only then report this worker as alive."""
        # TorchServe's worker logs a line for every request and metric.
        logging.getLogger().setLevel(logging.WARNING)
        self.run_folder = RunFolder(Path(os.environ["HEADCOUNT_RUN_FOLDER"]))
        try:
            # One process a core beats threads: README.md, Why it is so.
            torch.set_num_threads(1)
            cv2.setNumThreads(1)
            Image.MAX_IMAGE_PIXELS = None  # HEADCOUNT_MAX_PIXELS is checked instead, and this process is ours
            self.limits = Limits.from_environment()
            folder = Path(context.system_properties["model_dir"])
            self.detector = Detector(
                Path(os.environ.get("HEADCOUNT_CHECKPOINT") or next(folder.glob("*.pt"))),
                os.environ.get("HEADCOUNT_CLASS", "person"),
                folder,
                context.system_properties.get("gpu_id") or 0,
            )
            self._warm_up()
            self.run_folder.register(
                {"precision": dtype_name(self.detector.precision), "compiled": self.detector.compiled}
            )
        except Exception as error:
            # The launcher ends the container with this as its last line.
            self.run_folder.fail(str(error) or repr(error))
            raise

    def handle(self, rows: list[dict[str, Any]], context: Any) -> list[bytes]:
        """TorchServe's entry point: one answer for each row, whatever is wrong with the others."""
        over_grpc = any("data" in row for row in rows)
        with self.run_folder.answering_grpc() if over_grpc else contextlib.nullcontext():
            return self._handle(rows, context)

    def _handle(self, rows: list[dict[str, Any]], context: Any) -> list[bytes]:
        states = [self._guarded(row) for row in rows]
        self.predict(states)
        return [self.encode(state, context, i) for i, state in enumerate(states)]

    def decode(self, row: dict[str, Any]) -> RequestState:
        """From a row to a parsed request. Raises RequestError."""
        began = time.perf_counter()
        state = RequestState.of(self._request(row), self.limits)
        state.spend("decode", (time.perf_counter() - began) * 1e3)
        return state

    def predict(self, states: list[RequestState]) -> None:
        """Count in all pictures of a batch of requests.

        A few pictures at a time are read, counted and drawn on before the next are read: the objects that one request
        names may be larger than the memory, and none is read twice.
        """
        pictures = [(state, picture) for state in states for picture in state.pictures if picture.error is None]
        step = TOGETHER if self.detector.batches else READERS
        for start in range(0, len(pictures), step):
            part = [(state, picture) for state, picture in pictures[start : start + step] if state.error is None]
            try:
                self._count(part)
            except Exception:
                logger.exception("counting failed")
                for state, _ in part:
                    state.error = RequestError("the server failed to count in this request", 500)

    def _count(self, part: list[tuple[RequestState, Picture]]) -> None:
        self._read(part)
        # On a CPU one picture after the other, so that few pixels are in memory and the sign of life stays fresh.
        for some in [part] if self.detector.batches else [[one] for one in part]:
            boxes = [self._letterbox(state, picture) for state, picture in some]
            ready = [
                (state, picture, box) for (state, picture), box in zip(some, boxes, strict=True) if box is not None
            ]
            counts = self.detector.count([box for _, _, box in ready], [state.parameters for state, _, _ in ready])
            for (state, picture, box), count in zip(ready, counts, strict=True):
                self._finish(state, picture, box, count)

    def _finish(self, state: RequestState, picture: Picture, box: Letterbox, first: Count) -> None:
        """Look closer at a picture, and draw on it, if the request asks for that. first: what the first look gave."""
        alive = self.run_folder.sign_of_life
        try:
            count = self.detector.look_closer(box, first, state.parameters, state.budget, alive)
            for step, milliseconds in count.milliseconds.items():
                state.spend(step, milliseconds)
            if state.annotated:
                picture.annotated = annotate_count(picture.content, count, state.parameters, self.limits)
            picture.count = count
        except PictureError as error:  # for one, it could be read at a fraction of its size, but not whole
            picture.error = error
        picture.content = b""
        alive()

    def encode(self, state: RequestState, context: Any, row: int) -> bytes:
        """The answer's bytes; status and headers go into TorchServe's context."""
        body: bytes | None = None
        try:
            if state.error is None:
                body, content_type = self._answer(state)
                context.set_response_content_type(row, content_type)
                counts = (state.pictures[place].count for place in state.places)
                people = sum(len(count.people) for count in counts if count is not None)
                context.set_response_header(row, COUNT_HEADER, str(people))
        except RequestError as error:
            state.error = error
        except Exception:
            logger.exception("encoding failed")
            state.error = RequestError("the server failed to write this answer", 500)
        if body is None:
            assert state.error is not None
            context.set_response_status(state.error.code, "Refused", row)
            context.set_response_content_type(row, "application/json")
            body = _json(state.error.as_json())
        timing = ", ".join(f"{stage};dur={spent:.2f}" for stage, spent in state.milliseconds.items())
        context.set_response_header(row, "Server-Timing", timing)
        return body

    def _answer(self, state: RequestState) -> tuple[bytes, str]:
        assert state.request is not None
        answers = [self._prediction(state, i) for i in range(len(state.places))]
        errors = [answer for answer in answers if isinstance(answer, RequestError)]
        if len(errors) == len(answers):
            raise errors[0]
        if state.request.picture_wanted:
            return state.pictures[0].annotated or b"", "image/jpeg"
        if state.request.single:
            return _json(answers[0]), "application/json"
        predictions = [answer.as_json() if isinstance(answer, RequestError) else answer for answer in answers]
        return _json({"predictions": predictions}), "application/json"

    def _prediction(self, state: RequestState, i: int) -> dict[str, Any] | RequestError:
        """The answer to one instance."""
        assert state.request is not None
        picture = state.pictures[state.places[i]]
        if isinstance(picture.error, PictureError):
            return RequestError(str(picture.error) if state.request.single else f"instances[{i}]: {picture.error}")
        if picture.error is not None:
            return picture.error
        assert picture.count is not None
        prediction = picture.count.as_json(state.parameters, self.detector.model)
        if state.parameters.annotate:
            prediction["annotated"] = {"b64": base64.b64encode(picture.annotated or b"").decode()}
        return prediction

    def _request(self, row: dict[str, Any]) -> Request:
        body = row.get("body")
        if isinstance(body, bytes | bytearray) and "data" not in row:  # from the front
            try:
                told = json.loads(bytes(body))
                name, size = told["spooled"], told["size"]
                content_type, query, accept = told["content_type"], told["query"], told["accept"]
                if not re.fullmatch(SPOOLED_NAME, name):
                    raise ValueError
            except (ValueError, KeyError, TypeError):
                raise RequestError("over gRPC, send the picture's bytes, or JSON with instances, as 'data'") from None
            try:
                with (self.run_folder.spool / name).open("rb", 0) as file:
                    data = file.read(size)
            except FileNotFoundError:
                raise RequestError("the front gave this request up before a worker was free", 503) from None
            return parse_request(data, content_type, query, accept, self.limits)
        texts = {k: bytes(v).decode(errors="replace") for k, v in row.items() if k not in ("data", "body")}
        accept = texts.pop("accept", "")
        request = parse_request(bytes(row.get("data", b"")), "", "", accept, self.limits)
        return replace(request, parameters=Parameters.parse(texts)) if texts else request

    def _read(self, part: list[tuple[RequestState, Picture]]) -> None:
        """Fetch the pictures that lie in buckets, side by side."""
        began = time.perf_counter()
        remote = [(state, picture, picture.instance.uri) for state, picture in part if picture.instance.uri is not None]
        if not remote:
            return
        uris = list({uri for _, _, uri in remote})
        with ThreadPoolExecutor(READERS) as pool:
            read = dict(zip(uris, pool.map(self._read_object, uris), strict=True))
        for _, picture, uri in remote:
            content = read[uri]
            if isinstance(content, RequestError):
                picture.error = content
            else:
                picture.content = content
        for state in {id(state): state for state, _, _ in remote}.values():
            state.spend("decode", (time.perf_counter() - began) * 1e3)

    def _read_object(self, uri: str) -> bytes | RequestError:
        try:
            return read_object(uri, self.limits.request_bytes)
        except StorageError as error:
            return RequestError(str(error), error.code)
        finally:
            self.run_folder.sign_of_life()

    def _letterbox(self, state: RequestState, picture: Picture) -> Letterbox | None:
        if picture.error is not None:
            return None
        began = time.perf_counter()
        try:
            return self.detector.prepare(picture.content, self.limits, state.parameters)
        except PictureError as error:
            picture.error = error
            return None
        finally:
            state.spend("decode", (time.perf_counter() - began) * 1e3)
            self.run_folder.sign_of_life()

    def _guarded(self, row: dict[str, Any]) -> RequestState:
        try:
            return self.decode(row)
        except RequestError as error:
            return RequestState(error=error)
        except Exception:
            logger.exception("decoding failed")
            return RequestState(error=RequestError("the server failed to read this request", 500))

    def _warm_up(self) -> None:
        for height, width in ((640, 480), (480, 640)):
            noise = np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)
            picture = self.detector.prepare(simplejpeg.encode_jpeg(noise), self.limits)
            for _ in range(2):
                self.detector.count([picture], [Parameters()])


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


logging.getLogger("handler").addHandler(logging.StreamHandler(sys.stderr))
