"""The detector: from a picture's bytes to the people in it, with the fastest arithmetic this machine has."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from serving.contract import Limits, Parameters
from serving.network import Head, Network, load_network
from serving.pictures import Letterbox, letterbox

Forward = Callable[[Tensor], Sequence[Tensor]]

# More candidates than this above the confidence are noise; YOLOv5 caps them too. Bounds the suppression's time.
MAX_CANDIDATES = 3000


class Person(NamedTuple):
    """box: left, top, right, bottom in pixels of the upright picture. confidence: 0…1."""

    box: tuple[float, float, float, float]
    confidence: float


@dataclass(frozen=True)
class Count:
    """The people in one picture. width, height: of the upright picture in pixels. people: most confident first."""

    people: list[Person]
    width: int
    height: int
    milliseconds: dict[str, float] = field(default_factory=dict, compare=False)

    def as_json(self, parameters: Parameters, model: dict[str, str]) -> dict[str, Any]:
        listed = self.people[: parameters.max_people]
        return {
            "count": len(self.people),
            "people": [
                {"box": [round(v, 1) for v in person.box], "confidence": round(person.confidence, 3)}
                for person in listed
            ],
            "image": {"width": self.width, "height": self.height},
            "model": model,
        }


class Detector:
    """A YOLOv5 checkpoint ready to count one class of things.

    checkpoint: a YOLOv5 .pt file. counted: the class to count, by its name in the checkpoint. compiled: folder
    of what `serving.compile` made of these weights; it is used where this processor can run it. gpu: which of
    several. Raises CheckpointError.
    """

    def __init__(self, checkpoint: Path, counted: str = "person", compiled: Path | None = None, gpu: int = 0) -> None:
        network = load_network(checkpoint)
        network.keep_only(counted)
        digest = file_sha256(checkpoint)
        self.model = {"name": checkpoint.stem, "version": digest[:12]}
        self.head = network.head
        self.stride = max(self.head.strides)
        self.device = best_device(gpu)
        # A CPU gains nothing from batches, and the compiled network takes one picture.
        self.batches = self.device.type == "cuda"
        self.precision = best_precision(self.device)
        self.compiled = False
        self._forward: Forward = FromPictures(network.on(self.device, self.precision)).eval()
        if self.device.type == "cpu" and compiled is not None:
            library = compiled_network(compiled, digest, counted, self.precision)
            if library is not None:
                self._forward, self.compiled = library, True

    def prepare(self, data: bytes | memoryview, limits: Limits) -> Letterbox:
        """Decode one picture for `count`. Raises PictureError."""
        return letterbox(data, self.stride, limits.max_pixels)

    def count(self, pictures: Sequence[Letterbox], parameters: Sequence[Parameters]) -> list[Count]:
        """Count in pictures, each with parameters of its own; those of one shape go through the network together."""
        counts: dict[int, Count] = {}
        shapes: dict[tuple[int, ...], list[int]] = {}
        for i, picture in enumerate(pictures):
            key = picture.pixels.shape if self.batches else (i,)
            shapes.setdefault(key, []).append(i)
        for members in shapes.values():
            began = time.perf_counter()
            batch = torch.from_numpy(np.stack([pictures[i].pixels for i in members]))
            with torch.inference_mode():
                logits = [level.cpu() for level in self._forward(batch.to(self.device))]
            inferred = time.perf_counter()
            found = [
                decode_head([level[row] for level in logits], self.head, parameters[i].confidence)
                for row, i in enumerate(members)
            ]
            decoded = time.perf_counter()
            for i, candidates in zip(members, found, strict=True):
                people = choose_people(candidates, pictures[i], parameters[i])
                counts[i] = Count(people, pictures[i].width, pictures[i].height)
            counts[members[0]].milliseconds.update(
                inference=(inferred - began) * 1e3,
                head=(decoded - inferred) * 1e3,
                nms=(time.perf_counter() - decoded) * 1e3,
            )
        return [counts[i] for i in range(len(pictures))]


class FromPictures(nn.Module):
    """The network on what decoders make: (N, H, W, 3) uint8."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, pictures: Tensor) -> list[Tensor]:
        logits: list[Tensor] = self.network(pictures.permute(0, 3, 1, 2))
        return logits


def best_device(gpu: int) -> torch.device:
    """The GPU of that number, or the CPU where there is none or HEADCOUNT_ACCELERATOR says so."""
    # The image for CPUs lacks what torch would load on a GPU.
    cuda = os.environ.get("HEADCOUNT_ACCELERATOR") != "cpu" and torch.cuda.is_available()
    return torch.device(f"cuda:{gpu}" if cuda else "cpu")


def best_precision(device: torch.device) -> torch.dtype:
    """Half on a GPU, bfloat16 where the processor multiplies it in hardware, else float32."""
    if device.type == "cuda":
        return torch.float16
    flags = cpu_flags()
    return torch.bfloat16 if {"avx512_bf16", "amx_bf16"} & flags else torch.float32


def cpu_flags() -> set[str]:
    """The processor's instruction sets as Linux names them; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), set())


def compiled_network(folder: Path, digest: str, counted: str, precision: torch.dtype) -> Forward | None:
    """The compiled network for these weights, if one was made that this processor and this torch can run.

    One library serves pictures of any shape; the most common shapes have a faster one each.
    """
    try:
        facts = json.loads((folder / f"{word(precision)}.json").read_text())
    except OSError:
        return None
    fits = (facts["weights"], facts["counted"], facts["torch"]) == (digest, counted, torch.__version__)
    if not fits or not set(facts["cpu_flags"]) <= cpu_flags():
        return None
    # Not torch._inductor's loader: importing that takes seconds.
    from torch._C._aoti import AOTIModelContainerRunnerCpu

    run = {shape: AOTIModelContainerRunnerCpu(str(folder / name), 1).run for shape, name in facts["libraries"].items()}
    anything = run["any"]
    return lambda pictures: run.get(f"{pictures.shape[1]}x{pictures.shape[2]}", anything)([pictures])


def word(precision: torch.dtype) -> str:
    return str(precision).removeprefix("torch.")


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def decode_head(logits: Sequence[Tensor], head: Head, confidence: float) -> NDArray[np.float64]:
    """Candidates of one picture, (n, 5): left, top, width, height in letterboxed pixels, confidence; best first.

    logits: each level (anchors × 6, h, w). Only cells whose objectness alone reaches the confidence are decoded: it
    bounds the product from above. As in YOLOv5 v6.0+: https://github.com/ultralytics/yolov5/issues/471
    """
    bound = math.log(confidence / (1 - confidence)) if confidence < 1 else math.inf
    found = [np.empty((0, 5))]
    for level, stride, anchors in zip(logits, head.strides, head.anchors, strict=True):
        cells = level.reshape(len(anchors), 6, *level.shape[1:])
        a, y, x = torch.nonzero(cells[:, 4] >= bound, as_tuple=True)
        if len(a):
            values = cells[a, :, y, x].float().sigmoid()
            centre = (values[:, :2] * 2 - 0.5 + torch.stack((x, y), 1)) * stride
            size = (values[:, 2:4] * 2) ** 2 * anchors[a]
            found.append(torch.cat((centre - size / 2, size, values[:, 4:5] * values[:, 5:6]), 1).numpy())
    candidates = np.concatenate(found)
    candidates = candidates[candidates[:, 4] >= confidence]
    return candidates[np.argsort(-candidates[:, 4], kind="stable")[:MAX_CANDIDATES]]


def choose_people(candidates: NDArray[np.float64], picture: Letterbox, parameters: Parameters) -> list[Person]:
    """The candidates that overlap no better one too much and stand in the region, in the picture's own pixels."""
    if not len(candidates):
        return []
    kept = cv2.dnn.NMSBoxes(candidates[:, :4].tolist(), candidates[:, 4].tolist(), 0, parameters.iou)
    boxes = candidates[np.asarray(kept, dtype=np.intp).reshape(-1)]
    corners = np.concatenate((boxes[:, :2], boxes[:, :2] + boxes[:, 2:4]), 1)
    corners = (corners - np.array([picture.left, picture.top] * 2)) / np.array(picture.scale * 2)
    corners = np.clip(corners, 0, np.array([picture.width, picture.height] * 2))
    people = [Person((c[0], c[1], c[2], c[3]), float(b[4])) for c, b in zip(corners.tolist(), boxes, strict=True)]
    if parameters.region is not None:
        region = np.array(parameters.region, np.float32) * np.array([picture.width, picture.height], np.float32)
        people = [person for person in people if _stands_in(person, region)]
    return people


def _stands_in(person: Person, region: NDArray[np.float32]) -> bool:
    left, _, right, bottom = person.box
    return bool(cv2.pointPolygonTest(region, ((left + right) / 2, bottom), False) >= 0)
