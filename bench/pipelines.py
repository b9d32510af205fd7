"""The pipelines that are compared, each from a picture's bytes to a count, in one process and one thread."""

from __future__ import annotations

import io
import multiprocessing
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image

from serving.contract import Limits, Parameters
from serving.detector import Detector
from serving.network import load_network

Stages = dict[str, float]  # milliseconds by stage
CORES = 2
CPU = "CPU a picture"  # beside the stages; hardly moves when something else is running too


class Plain:
    """What one would write first: Pillow, eager float32 in channels_last, all classes decoded."""

    def __init__(self, checkpoint: Path) -> None:
        self.network = load_network(checkpoint).to(memory_format=torch.channels_last)

    def __call__(self, data: bytes) -> tuple[int, Stages]:
        clock = _Clock()
        picture = Image.open(io.BytesIO(data)).convert("RGB")
        clock("decode")
        ratio = 640 / max(picture.size)
        inner = (round(picture.width * ratio), round(picture.height * ratio))
        outer = (-(-inner[0] // 32) * 32, -(-inner[1] // 32) * 32)
        canvas = Image.new("RGB", outer, (114, 114, 114))
        middle = ((outer[0] - inner[0]) // 2, (outer[1] - inner[1]) // 2)
        canvas.paste(picture.resize(inner, Image.Resampling.BILINEAR), middle)
        pixels = torch.from_numpy(np.asarray(canvas).copy()).permute(2, 0, 1)[None].float()
        clock("resize")
        with torch.inference_mode():
            logits = self.network(pixels)
        clock("forward")
        with torch.inference_mode():
            boxes = torch.cat([self._decode(level, i) for i, level in enumerate(logits)], 1)[0]
        clock("head")
        scores, classes = (boxes[:, 4:5] * boxes[:, 5:]).max(1)
        kept = (scores > 0.25).nonzero()[:, 0]
        # One suppression for all classes: those of different classes are moved apart.
        shifted = boxes[kept, :4] + torch.stack((classes[kept],) * 2 + (classes[kept] * 0,) * 2, 1) * 4096
        chosen = cv2.dnn.NMSBoxes(shifted.tolist(), scores[kept].tolist(), 0.25, 0.45)
        count = int((classes[kept][torch.as_tensor(np.asarray(chosen, dtype=np.int64).reshape(-1))] == 0).sum())
        clock("nms")
        return count, clock.stages

    def _decode(self, level: torch.Tensor, i: int) -> torch.Tensor:
        head = self.network.head
        _, _, h, w = level.shape
        y = level.view(1, 3, -1, h, w).permute(0, 1, 3, 4, 2).sigmoid()
        rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        size = (y[..., 2:4] * 2) ** 2 * head.anchors[i].view(1, 3, 1, 1, 2)
        centre = (y[..., :2] * 2 - 0.5 + torch.stack((columns, rows), 2)) * head.strides[i]
        return torch.cat((centre - size / 2, size, y[..., 4:]), -1).view(1, 3 * h * w, -1)


class HeadcountPipeline:
    """What the image runs."""

    def __init__(self, checkpoint: Path, compiled: Path | None) -> None:
        self.detector = Detector(checkpoint, compiled=compiled)
        self.name = f"{'compiled' if self.detector.compiled else 'eager'} {str(self.detector.precision)[6:]}"

    def __call__(self, data: bytes) -> tuple[int, Stages]:
        box = self.detector.prepare(data, Limits())
        (count,) = self.detector.count([box], [Parameters()])
        spent = count.milliseconds
        return len(count.people), box.milliseconds | {
            "forward": spent["inference"], "head": spent["head"], "nms": spent["nms"],
        }  # fmt: skip


class _Clock:
    def __init__(self) -> None:
        self.stages: Stages = {}
        self._last = time.perf_counter()

    def __call__(self, stage: str) -> None:
        now = time.perf_counter()
        self.stages[stage] = (now - self._last) * 1e3
        self._last = now


PIPELINES: dict[str, Callable[[Path, Path | None], Callable[[bytes], tuple[int, Stages]]]] = {
    "plain": lambda checkpoint, _: Plain(checkpoint),
    "eager": lambda checkpoint, _: HeadcountPipeline(checkpoint, None),
    "headcount": HeadcountPipeline,
}


def worker(pipe: Connection, name: str, checkpoint: Path, compiled: Path | None) -> None:
    """One process of a pipeline: answers (picture, seconds) with pictures a second and stages, None ends it."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    count = PIPELINES[name](checkpoint, compiled)
    while (order := pipe.recv()) is not None:
        data, seconds = order
        if seconds == 0:
            pipe.send(count(data)[0])
            continue
        done, stages, began, spent = 0, [], time.perf_counter(), time.process_time()
        while time.perf_counter() < began + seconds:
            stages.append(count(data)[1])
            done += 1
        rate = done / (time.perf_counter() - began)
        pipe.send((rate, median_stages(stages) | {CPU: (time.process_time() - spent) / done * 1e3}))


def median_stages(many: list[Stages]) -> Stages:
    return {stage: statistics.median(one[stage] for one in many) for stage in many[0]}


class Pipeline:
    """A pipeline in CORES processes."""

    def __init__(self, name: str, checkpoint: Path, compiled: Path | None) -> None:
        self.workers = []
        for _ in range(CORES):
            ours, theirs = multiprocessing.Pipe()
            process = multiprocessing.Process(target=worker, args=(theirs, name, checkpoint, compiled), daemon=True)
            process.start()
            self.workers.append((ours, process))

    def rate(self, data: bytes, seconds: float) -> tuple[float, Stages]:
        """Pictures a second of all processes together, and what each stage took."""
        for pipe, _ in self.workers:
            pipe.send((data, seconds))
        answers = [pipe.recv() for pipe, _ in self.workers]
        return sum(rate for rate, _ in answers), median_stages([stages for _, stages in answers])

    def counts(self, pictures: list[bytes]) -> list[int]:
        pipe = self.workers[0][0]
        found = []
        for picture in pictures:
            pipe.send((picture, 0))
            found.append(pipe.recv())
        return found

    def close(self) -> None:
        for pipe, process in self.workers:
            pipe.send(None)
            process.join()
