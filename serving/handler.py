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
from serving.detector import TOGETHER, Count, Detector, word
from serving.pictures import Letterbox, PictureError
from serving.run_folder import RunFolder
from serving.spool import SPOOLED_NAME
from serving.storage import StorageError, read_object
from serving.work import Picture, Work, annotate_count

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
            self.run_folder.register({"precision": word(self.detector.precision), "compiled": self.detector.compiled})
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
        works = [self._guarded(row) for row in rows]
        self.predict(works)
        return [self.encode(work, context, i) for i, work in enumerate(works)]

    def decode(self, row: dict[str, Any]) -> Work:
        """From a row to a parsed request. Raises RequestError."""
        began = time.perf_counter()
        work = Work.of(self._request(row), self.limits)
        work.spend("decode", (time.perf_counter() - began) * 1e3)
        return work

    def predict(self, works: list[Work]) -> None:
        """Count in all pictures of a batch of requests.

        A few pictures at a time are read, counted and drawn on before the next are read: the objects that one request
        names may be larger than the memory, and none is read twice.
        """
        pictures = [(work, picture) for work in works for picture in work.pictures if picture.error is None]
        step = TOGETHER if self.detector.batches else READERS
        for start in range(0, len(pictures), step):
            part = [(work, picture) for work, picture in pictures[start : start + step] if work.error is None]
            try:
                self._count(part)
            except Exception:
                logger.exception("counting failed")
                for work, _ in part:
                    work.error = RequestError("the server failed to count in this request", 500)

    def _count(self, part: list[tuple[Work, Picture]]) -> None:
        self._read(part)
        # On a CPU one picture after the other, so that few pixels are in memory and the sign of life stays fresh.
        for some in [part] if self.detector.batches else [[one] for one in part]:
            boxes = [self._letterbox(work, picture) for work, picture in some]
            ready = [(work, picture, box) for (work, picture), box in zip(some, boxes, strict=True) if box is not None]
            counts = self.detector.count([box for _, _, box in ready], [work.parameters for work, _, _ in ready])
            for (work, picture, box), count in zip(ready, counts, strict=True):
                self._finish(work, picture, box, count)

    def _finish(self, work: Work, picture: Picture, box: Letterbox, first: Count) -> None:
        """Look closer at a picture, and draw on it, if the request asks for that. first: what the first look gave."""
        alive = self.run_folder.sign_of_life
        try:
            count = self.detector.look_closer(box, first, work.parameters, work.budget, alive)
            for step, milliseconds in count.milliseconds.items():
                work.spend(step, milliseconds)
            if work.annotated:
                picture.annotated = annotate_count(picture.content, count, work.parameters, self.limits)
            picture.count = count
        except PictureError as error:  # for one, it could be read at a fraction of its size, but not whole
            picture.error = error
        picture.content = b""
        alive()

    def encode(self, work: Work, context: Any, row: int) -> bytes:
        """The answer's bytes; status and headers go into TorchServe's context."""
        body: bytes | None = None
        try:
            if work.error is None:
                body, content_type = self._answer(work)
                context.set_response_content_type(row, content_type)
                counts = (work.pictures[place].count for place in work.places)
                people = sum(len(count.people) for count in counts if count is not None)
                context.set_response_header(row, COUNT_HEADER, str(people))
        except RequestError as error:
            work.error = error
        except Exception:
            logger.exception("encoding failed")
            work.error = RequestError("the server failed to write this answer", 500)
        if body is None:
            assert work.error is not None
            context.set_response_status(work.error.code, "Refused", row)
            context.set_response_content_type(row, "application/json")
            body = _json(work.error.as_json())
        timing = ", ".join(f"{stage};dur={spent:.2f}" for stage, spent in work.milliseconds.items())
        context.set_response_header(row, "Server-Timing", timing)
        return body

    def _answer(self, work: Work) -> tuple[bytes, str]:
        assert work.request is not None
        answers = [self._prediction(work, i) for i in range(len(work.places))]
        errors = [answer for answer in answers if isinstance(answer, RequestError)]
        if len(errors) == len(answers):
            raise errors[0]
        if work.request.picture_wanted:
            return work.pictures[0].annotated or b"", "image/jpeg"
        if work.request.single:
            return _json(answers[0]), "application/json"
        predictions = [answer.as_json() if isinstance(answer, RequestError) else answer for answer in answers]
        return _json({"predictions": predictions}), "application/json"

    def _prediction(self, work: Work, i: int) -> dict[str, Any] | RequestError:
        """The answer to one instance."""
        assert work.request is not None
        picture = work.pictures[work.places[i]]
        if isinstance(picture.error, PictureError):
            return RequestError(str(picture.error) if work.request.single else f"instances[{i}]: {picture.error}")
        if picture.error is not None:
            return picture.error
        assert picture.count is not None
        prediction = picture.count.as_json(work.parameters, self.detector.model)
        if work.parameters.annotate:
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

    def _read(self, part: list[tuple[Work, Picture]]) -> None:
        """Fetch the pictures that lie in buckets, side by side."""
        began = time.perf_counter()
        remote = [(work, picture, picture.instance.uri) for work, picture in part if picture.instance.uri is not None]
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
        for work in {id(work): work for work, _, _ in remote}.values():
            work.spend("decode", (time.perf_counter() - began) * 1e3)

    def _read_object(self, uri: str) -> bytes | RequestError:
        try:
            return read_object(uri, self.limits.request_bytes)
        except StorageError as error:
            return RequestError(str(error), error.code)
        finally:
            self.run_folder.sign_of_life()

    def _letterbox(self, work: Work, picture: Picture) -> Letterbox | None:
        if picture.error is not None:
            return None
        began = time.perf_counter()
        try:
            return self.detector.prepare(picture.content, self.limits, work.parameters)
        except PictureError as error:
            picture.error = error
            return None
        finally:
            work.spend("decode", (time.perf_counter() - began) * 1e3)
            self.run_folder.sign_of_life()

    def _guarded(self, row: dict[str, Any]) -> Work:
        try:
            return self.decode(row)
        except RequestError as error:
            return Work(error=error)
        except Exception:
            logger.exception("decoding failed")
            return Work(error=RequestError("the server failed to read this request", 500))

    def _warm_up(self) -> None:
        for height, width in ((640, 480), (480, 640)):
            noise = np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)
            picture = self.detector.prepare(simplejpeg.encode_jpeg(noise), self.limits)
            for _ in range(2):
                self.detector.count([picture], [Parameters()])


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


logging.getLogger("handler").addHandler(logging.StreamHandler(sys.stderr))
