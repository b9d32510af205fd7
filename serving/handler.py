"""The TorchServe handler that counts people: set up once, then decode, predict, encode."""

from __future__ import annotations

import base64
import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import simplejpeg
from PIL import Image

from serving.base_handler import BaseHandler, RawRequest, Reply, as_json
from serving.contract import COUNT_HEADER, Parameters, RequestError, parse_request
from serving.detector import TOGETHER, Count, Detector, dtype_name
from serving.pictures import Letterbox, PictureError
from serving.request_state import PeopleState, PictureState, annotate_count
from serving.storage import StorageError, read_object

logger = logging.getLogger("handler")
READERS = 8  # pictures of one request that are in memory together, read side by side if they lie in buckets


class PeopleHandler(BaseHandler[PeopleState]):
    """Counts people."""

    state_type = PeopleState

    def set_up(self, model: Path, folder: Path, gpu: int) -> dict[str, Any]:
        """Load the network of a checkpoint and run a picture through it. model: the checkpoint, or its folder."""
        cv2.setNumThreads(1)
        Image.MAX_IMAGE_PIXELS = None  # HEADCOUNT_MAX_PIXELS is checked instead, and this process is ours
        checkpoint = next(model.glob("*.pt")) if model.is_dir() else model
        self.detector = Detector(checkpoint, os.environ.get("HEADCOUNT_CLASS", "person"), folder, gpu)
        self._warm_up()
        return {"precision": dtype_name(self.detector.precision), "compiled": self.detector.compiled}

    def decode(self, raw: RawRequest) -> PeopleState:
        request = parse_request(raw.data, raw.content_type, raw.query, raw.accept, self.limits)
        if raw.fields:
            request = replace(request, parameters=Parameters.parse(raw.fields))
        return PeopleState.of(request, self.limits)

    def predict(self, states: list[PeopleState]) -> None:
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

    def _count(self, part: list[tuple[PeopleState, PictureState]]) -> None:
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

    def _finish(self, state: PeopleState, picture: PictureState, box: Letterbox, first: Count) -> None:
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

    def answer(self, state: PeopleState) -> Reply:
        assert state.request is not None
        answers = [self._prediction(state, i) for i in range(len(state.places))]
        errors = [answer for answer in answers if isinstance(answer, RequestError)]
        if len(errors) == len(answers) and (state.request.single or not state.parameters.inline_errors):
            raise errors[0]
        counts = (state.pictures[place].count for place in state.places)
        headers = {COUNT_HEADER: str(sum(len(count.people) for count in counts if count is not None))}
        if state.request.picture_wanted:
            return Reply(state.pictures[0].annotated or b"", "image/jpeg", headers)
        if state.request.single:
            return Reply(as_json(answers[0]), headers=headers)
        predictions = [answer.as_json() if isinstance(answer, RequestError) else answer for answer in answers]
        return Reply(as_json({"predictions": predictions}), headers=headers)

    def _prediction(self, state: PeopleState, i: int) -> dict[str, Any] | RequestError:
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

    def _read(self, part: list[tuple[PeopleState, PictureState]]) -> None:
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

    def _letterbox(self, state: PeopleState, picture: PictureState) -> Letterbox | None:
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

    def _warm_up(self) -> None:
        for height, width in ((640, 480), (480, 640)):
            noise = np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)
            picture = self.detector.prepare(simplejpeg.encode_jpeg(noise), self.limits)
            for _ in range(2):
                self.detector.count([picture], [Parameters()])
