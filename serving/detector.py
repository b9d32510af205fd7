"""The detector: from a picture's bytes to the people in it, with the fastest arithmetic this machine has."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from serving.contract import Limits, Parameters, Person
from serving.looks import (
    AUTO_GAIN,
    AUTO_LOOKS,
    AUTO_STEP,
    FAINT,
    Boxes,
    Budget,
    Look,
    Seen,
    full_looks,
    look_where_promising,
    merge,
    scales,
    whole,
)
from serving.network import Head, Network, load_network
from serving.pictures import Letterbox, PictureError, Pixels, closer_look, letterbox

Forward = Callable[[Tensor], Sequence[Tensor]]

# More candidates than this above the confidence are noise; YOLOv5 caps them too. Bounds the suppression's time.
MAX_CANDIDATES = 3000
TOGETHER = 16  # pictures, or parts of one, that go through a GPU together


@dataclass(frozen=True)
class Count:
    """The people in one picture.

    width, height: of the upright picture in pixels. people: most confident first. candidates: likewise, those who are
    less confident and were asked for. looks: times that the network looked
    at the picture or a part of it. note: what the caller should know of how it was counted. seen: what a first look
    found, candidates included, if closer ones may follow.
    """

    people: list[Person]
    width: int
    height: int
    looks: int = 1
    candidates: list[Person] = field(default_factory=list)
    note: str = ""
    seen: Seen | None = field(default=None, compare=False, repr=False)
    milliseconds: dict[str, float] = field(default_factory=dict, compare=False)

    def as_json(self, parameters: Parameters, model: dict[str, str]) -> dict[str, Any]:
        answer: dict[str, Any] = {
            "count": len(self.people),
            "people": [person.as_json() for person in self.people[: parameters.max_people]],
            "image": {"width": self.width, "height": self.height},
            "looks": self.looks,
            "model": model,
        }
        if parameters.grid is not None:
            answer["grid"] = self.in_cells(*parameters.grid)
        if parameters.candidates is not None:
            answer["candidates"] = [person.as_json() for person in self.candidates]
        if self.note:
            answer["note"] = self.note
        return answer

    def in_cells(self, columns: int, rows: int) -> list[list[int]]:
        """How many people stand in each cell of a grid: rows from the top, cells from the left."""
        counts = [[0] * columns for _ in range(rows)]
        for person in self.people:
            x, y = foot(person)
            # On the right and the lower edge of the picture, people are in the last cell.
            column, row = int(x / self.width * columns), int(y / self.height * rows)
            counts[min(row, rows - 1)][min(column, columns - 1)] += 1
        return counts


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

    def prepare(self, data: bytes | memoryview, limits: Limits, parameters: Parameters | None = None) -> Letterbox:
        """Decode one picture for `count` with these parameters. Raises PictureError."""
        # Where many pictures are counted together, their own pixels would be too much for the memory.
        keep = parameters is not None and parameters.detail != "fast" and not self.batches
        return letterbox(data, self.stride, limits.max_pixels, keep)

    def count(self, pictures: Sequence[Letterbox], parameters: Sequence[Parameters]) -> list[Count]:
        """Take one look at each picture, with parameters of its own; `look_closer` takes the others, if any.

        Pictures of one shape go through the network together.
        """
        spent: dict[str, float] = {}
        closer = [_may_look_closer(*both) for both in zip(pictures, parameters, strict=True)]
        least = [_faintest(*both) for both in zip(parameters, closer, strict=True)]
        counts = []
        for picture, candidates, own, more in zip(
            pictures, self._candidates(pictures, least, spent), parameters, closer, strict=True
        ):
            began = time.perf_counter()
            boxes = suppress(candidates, picture, own.iou)
            size = picture.width, picture.height
            people = people_of(boxes[boxes[:, 4] >= own.confidence], *size, own)
            seen = Seen(whole(*size), boxes) if more else None
            counts.append(Count(people, *size, candidates=_candidates(boxes, *size, own), seen=seen))
            _spend(spent, "nms", began)
        if counts:
            counts[0].milliseconds.update(spent)
        return counts

    def look_closer(
        self,
        picture: Letterbox,
        count: Count,
        parameters: Parameters,
        budget: Budget,
        alive: Callable[[], None] | None = None,
    ) -> Count:
        """Take the closer looks that the parameters ask for, after the look at the whole picture that gave the count.

        budget: what they may take; what they took is subtracted. alive: called after each look or few.
        Raises PictureError for a picture that is damaged where the first look did not need it, and for one at which
        detail=full takes more than the budget.
        """
        if count.seen is None or picture.own is None:
            return count
        width, height, note = count.width, count.height, ""
        spent = dict(count.milliseconds)
        see = partial(self._see, cache(picture.own), parameters, spent, budget, alive)
        everything = full_looks(width, height)
        if parameters.detail == "full":
            if len(everything) > budget.looks:
                why = f"{budget.looks} of this request's are left", "HEADCOUNT_MAX_LOOKS"
                raise _too_much(len(everything), width, height, *why)
            seen = [count.seen, *see(everything)]
            if len(seen) <= len(everything):
                why = f"the time for them was over after {len(seen) - 1}", "HEADCOUNT_LOOK_SECONDS"
                raise _too_much(len(everything), width, height, *why)
        else:
            most = min(budget.looks, AUTO_LOOKS)
            seen, more = look_where_promising(count.seen, width, height, parameters.confidence, most, see)
            if more:
                note = (
                    f"there are signs of people in more places than {len(seen) - 1} closer looks could reach; "
                    f"detail=full takes {len(everything)}"
                )
        began = time.perf_counter()
        people, candidates = count.people, count.candidates
        if len(seen) > 1:
            people = people_of(merge(seen, parameters.confidence, parameters.iou), width, height, parameters)
            if parameters.candidates is not None:
                fainter = merge(seen, parameters.candidates, parameters.iou)
                candidates = _candidates(fainter, width, height, parameters)
        _spend(spent, "merge", began)
        return Count(people, width, height, len(seen), candidates, note, milliseconds=spent)

    def _see(
        self,
        own: Callable[[], Pixels],
        parameters: Parameters,
        spent: dict[str, float],
        budget: Budget,
        alive: Callable[[], None] | None,
        looks: Sequence[Look],
    ) -> list[Seen]:
        """Take closer looks at a picture, a few at a time, until the time is over. own: returns its own pixels."""
        seen: list[Seen] = []
        step = TOGETHER if self.batches else 1
        for start in range(0, len(looks), step):
            if budget.seconds <= 0:
                break
            some = looks[start : start + step]
            first = began = time.perf_counter()
            pixels = own()  # decodes once
            _spend(spent, "decode", began)
            began = time.perf_counter()
            parts = [closer_look(pixels, look, self.stride) for look in some]
            _spend(spent, "resize", began)
            found = self._candidates(parts, [_faintest(parameters, True)] * len(parts), spent)
            began = time.perf_counter()
            for look, part, candidates in zip(some, parts, found, strict=True):
                boxes = suppress(candidates, part, parameters.iou)
                boxes[:, :4] += [look.left, look.top] * 2
                seen.append(Seen(look, boxes))
            _spend(spent, "nms", began)
            budget.looks -= len(some)
            budget.seconds -= time.perf_counter() - first
            if alive is not None:
                alive()
        return seen

    def _candidates(
        self, pictures: Sequence[Letterbox], least: Sequence[float], spent: dict[str, float]
    ) -> list[NDArray[np.float64]]:
        """What the network sees in each picture, as `decode_head` returns it. least: the confidence for each."""
        found: dict[int, NDArray[np.float64]] = {}
        shapes: dict[tuple[int, ...], list[int]] = {}
        for i, picture in enumerate(pictures):
            key = picture.pixels.shape if self.batches else (i,)
            shapes.setdefault(key, []).append(i)
        for members in shapes.values():
            began = time.perf_counter()
            batch = torch.from_numpy(np.stack([pictures[i].pixels for i in members]))
            with torch.inference_mode():
                logits = [level.cpu() for level in self._forward(batch.to(self.device))]
            _spend(spent, "inference", began)
            began = time.perf_counter()
            for row, i in enumerate(members):
                found[i] = decode_head([level[row] for level in logits], self.head, least[i])
            _spend(spent, "head", began)
        return [found[i] for i in range(len(pictures))]


def _faintest(parameters: Parameters, closer: bool) -> float:
    """The least confidence that matters. closer: whether closer looks may follow, which use faint evidence."""
    return min(parameters.confidence, parameters.candidates or 1, FAINT if closer else 1)


def _candidates(boxes: Boxes, width: int, height: int, parameters: Parameters) -> list[Person]:
    """Those who are less confident than the people who count, if they were asked for."""
    if parameters.candidates is None:
        return []
    confidence = boxes[:, 4]
    fainter = boxes[(confidence >= parameters.candidates) & (confidence < parameters.confidence)]
    return people_of(fainter, width, height, parameters)


def _too_much(looks: int, width: int, height: int, why: str, setting: str) -> PictureError:
    return PictureError(
        f"detail=full takes {looks} closer looks at a picture of {width}×{height}, and {why}: send it smaller or by "
        f"itself, use detail=auto, or raise {setting} where the server runs"
    )


def _may_look_closer(picture: Letterbox, parameters: Parameters) -> bool:
    least = {"fast": math.inf, "full": 1.0, "auto": AUTO_GAIN}[parameters.detail]
    return bool(scales(picture.width, picture.height, AUTO_STEP, least))


def _spend(spent: dict[str, float], stage: str, began: float) -> None:
    spent[stage] = spent.get(stage, 0) + (time.perf_counter() - began) * 1e3


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
        facts = json.loads((folder / f"{dtype_name(precision)}.json").read_text())
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


def dtype_name(precision: torch.dtype) -> str:
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
    return people_of(suppress(candidates, picture, parameters.iou), picture.width, picture.height, parameters)


def suppress(candidates: NDArray[np.float64], picture: Letterbox, iou: float) -> Boxes:
    """The candidates of `decode_head` that overlap no better one by more than iou, in the picture's own pixels."""
    kept = cv2.dnn.NMSBoxes(candidates[:, :4].tolist(), candidates[:, 4].tolist(), 0, iou) if len(candidates) else ()
    boxes = candidates[np.asarray(kept, dtype=np.intp).reshape(-1)]
    corners = np.concatenate((boxes[:, :2], boxes[:, :2] + boxes[:, 2:4]), 1)
    corners = (corners - np.array([picture.left, picture.top] * 2)) / np.array(picture.scale * 2)
    corners = np.clip(corners, 0, np.array([picture.width, picture.height] * 2))
    return np.concatenate((corners, boxes[:, 4:5]), 1)


def people_of(boxes: Boxes, width: int, height: int, parameters: Parameters) -> list[Person]:
    """The people of these boxes who stand in the region, if there is one. width, height: of the picture."""
    people = [Person((b[0], b[1], b[2], b[3]), b[4]) for b in boxes.tolist()]
    if parameters.region is not None:
        region = np.array(parameters.region, np.float32) * np.array([width, height], np.float32)
        people = [person for person in people if cv2.pointPolygonTest(region, foot(person), False) >= 0]
    return people


def foot(person: Person) -> tuple[float, float]:
    """Where a person stands: the middle of the box's lower edge."""
    left, _, right, bottom = person.box
    return (left + right) / 2, bottom
