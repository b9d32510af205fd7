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

from serving.contract import COUNT_HEADER, Instance, Limits, Parameters, Request, RequestError, parse_request
from serving.detector import Count, Detector, word
from serving.pictures import Letterbox, PictureError
from serving.run_folder import RunFolder
from serving.spool import SPOOLED_NAME
from serving.storage import StorageError, read_object
from serving.work import Work, annotate_count

logger = logging.getLogger("handler")
READERS = 8  # objects of buckets that are read side by side


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
        try:
            self.predict(works)
        except Exception:
            logger.exception("counting failed")
            for work in works:
                work.error = work.error or RequestError("the server failed to count in this request", 500)
        return [self.encode(work, context, i) for i, work in enumerate(works)]

    def decode(self, row: dict[str, Any]) -> Work:
        """From a row to letterboxed pictures; a picture that fails leaves its error in its place."""
        began = time.perf_counter()
        request = self._request(row)
        work = Work(request)
        # Letterboxed before the next are read: the objects of one request may be larger than the memory.
        for start in range(0, len(request.instances), READERS):
            for picture in self._pictures(request.instances[start : start + READERS]):
                where = "" if request.single else f"instances[{len(work.letterboxes)}]: "
                work.letterboxes.append(self._letterbox(picture, where))
        work.milliseconds["decode"] = (time.perf_counter() - began) * 1e3
        return work

    def predict(self, works: list[Work]) -> None:
        """Count in all pictures of a batch of requests."""
        good = [
            (work, i, box) for work in works for i, box in enumerate(work.letterboxes) if isinstance(box, Letterbox)
        ]
        # On a CPU one picture after the other, so that the sign of life stays fresh in long requests.
        step = len(good) if self.detector.batches else 1
        for start in range(0, len(good), step or 1):
            part = good[start : start + step]
            counts = self.detector.count([box for _, _, box in part], [work.parameters for work, _, _ in part])
            for (work, _, _), count in zip(part, counts, strict=True):
                work.counts.append(count)
                for stage, spent in count.milliseconds.items():
                    work.milliseconds[stage] = work.milliseconds.get(stage, 0) + spent
            self.run_folder.sign_of_life()
        for work in works:
            found = iter(work.counts)
            work.counts = [box if isinstance(box, RequestError) else next(found) for box in work.letterboxes]

    def encode(self, work: Work, context: Any, row: int) -> bytes:
        """The answer's bytes; status and headers go into TorchServe's context."""
        body: bytes | None = None
        try:
            if work.error is None:
                body, content_type = self._answer(work)
                context.set_response_content_type(row, content_type)
                people = sum(len(count.people) for count in work.counts if isinstance(count, Count))
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
        if work.request.single:
            (count,) = work.counts
            if isinstance(count, RequestError):
                raise count
            if work.request.picture_wanted:
                return self._annotated(work, 0), "image/jpeg"
            return _json(self._prediction(work, 0)), "application/json"
        errors = [count for count in work.counts if isinstance(count, RequestError)]
        if len(errors) == len(work.counts):
            raise errors[0]
        predictions = [
            count.as_json() if isinstance(count, RequestError) else self._prediction(work, i)
            for i, count in enumerate(work.counts)
        ]
        return _json({"predictions": predictions}), "application/json"

    def _prediction(self, work: Work, i: int) -> dict[str, Any]:
        count = work.counts[i]
        assert isinstance(count, Count)
        prediction = count.as_json(work.parameters, self.detector.model)
        if work.parameters.annotate:
            prediction["annotated"] = {"b64": base64.b64encode(self._annotated(work, i)).decode()}
        return prediction

    def _annotated(self, work: Work, i: int) -> bytes:
        count = work.counts[i]
        assert isinstance(count, Count)
        assert work.request is not None
        self.run_folder.sign_of_life()
        (data,) = self._pictures(work.request.instances[i : i + 1])
        if isinstance(data, RequestError):
            raise data
        return annotate_count(data, count, work.parameters, self.limits)

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

    def _pictures(self, instances: list[Instance]) -> list[bytes | memoryview | RequestError]:
        """The instances' bytes; those in buckets are read side by side."""
        remote = [i.uri for i in instances if i.uri]
        read: dict[str, bytes | RequestError] = {}
        if remote:
            with ThreadPoolExecutor(READERS) as pool:
                read = dict(zip(remote, pool.map(self._read, remote), strict=True))
        return [
            instance.error or (read[instance.uri] if instance.uri else instance.data or b"") for instance in instances
        ]

    def _read(self, uri: str) -> bytes | RequestError:
        try:
            return read_object(uri, self.limits.request_bytes)
        except StorageError as error:
            return RequestError(str(error), error.code)
        finally:
            self.run_folder.sign_of_life()

    def _letterbox(self, picture: bytes | memoryview | RequestError, where: str) -> Letterbox | RequestError:
        if isinstance(picture, RequestError):
            return picture
        try:
            return self.detector.prepare(picture, self.limits)
        except PictureError as error:
            return RequestError(f"{where}{error}")
        finally:
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
