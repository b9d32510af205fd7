"""Crowds: the count error of each `detail` against its cost, as a table and a plot: `python -m bench.crowds`.

Nobody labelled crowds that may be had here, so they are put together from the 128 labelled pictures of coco128: mosaics
of 3×3 and 5×5 pictures in cells of about 640×480 pixels, whose seams and whose pictures' places in them are random. The
baseline is what a look at each of those pictures by itself finds, added up. Further sets are the single pictures, and
the same enlarged three times, in which there is nothing more to see, so that closer looks can only do harm.

The constants of serving/looks.py were chosen on one half of the pictures; this reports on the other half (--half). The
labels are COCO's: they leave out most of the spectators on a stand, so that whoever finds them is charged with errors.
YOLOv5 was trained on these pictures: the figures compare ways to look, they are no claim of quality.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from headcount.data import fetch, find_weights
from serving.contract import DETAILS, Limits, Parameters
from serving.detector import Count, Detector
from serving.looks import Boxes, Budget, Seen
from serving.pictures import PADDING, Pixels

RESULTS = Path(__file__).resolve().parent / "results"
CELL = (640, 480)  # pixels
JITTER = 0.1  # of the cell's sides, by which seams are moved at most
VISIBLE = 0.25  # of a labelled box must be in a mosaic for the person to count
ALONE, OVERLAP_ONLY = "alone", "full, merged by overlap alone"
WAYS = (*DETAILS, OVERLAP_ONLY)
Truth = NDArray[np.float64]  # (n, 4): left, top, right, bottom of the labelled people


@dataclass(frozen=True)
class Sample:
    """A picture to count in. parts: the pictures it was put together from, as JPEGs."""

    data: bytes
    people: Truth
    parts: list[bytes] = field(default_factory=list)


@dataclass
class Tally:
    """What a way of counting made of a set. right: people whose box has an IoU of 0.5 with a label of its own."""

    pictures: int = 0
    people: int = 0
    found: int = 0
    error: int = 0
    right: int = 0
    looks: int = 0
    cpu: float = 0  # seconds

    def row(self) -> dict[str, float]:
        return {
            "found": self.found / self.people, "error": self.error / self.people, "recall": self.right / self.people,
            "precision": self.right / max(1, self.found), "looks": self.looks / self.pictures,
            "cpu ms": self.cpu / self.pictures * 1e3,
        }  # fmt: skip


def labelled(half: int | None) -> list[tuple[Pixels, Truth]]:
    """The pictures of coco128 with the boxes of their people. half: 0 was used to choose constants, 1 was not."""
    folder = fetch("coco128")
    files = sorted((folder / "images").iterdir())
    if half is not None:
        files = [files[i] for i in np.random.default_rng(12345).permutation(len(files))[half::2]]
    found = []
    for file in files:
        picture = cv2.imread(str(file))
        assert picture is not None
        height, width = picture.shape[:2]
        label = folder / "labels" / f"{file.stem}.txt"
        lines = [line.split() for line in label.read_text().splitlines()] if label.exists() else []
        boxes = np.array([values[1:] for values in lines if values[0] == "0"], float).reshape(-1, 4)
        corners = np.hstack((boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2))
        found.append((picture.astype(np.uint8), corners * np.array([width, height] * 2)))
    return found


def single(picture: Pixels, people: Truth, times: int = 1) -> Sample:
    if times > 1:
        picture = cv2.resize(picture, None, fx=times, fy=times, interpolation=cv2.INTER_CUBIC).astype(np.uint8)
    return Sample(jpeg(picture), people * times)


def mosaics(pictures: Sequence[tuple[Pixels, Truth]], side: int, seed: int) -> Iterator[Sample]:
    """Mosaics of side × side pictures, each picture in one of them."""
    rng = np.random.default_rng([seed, side])
    order = rng.permutation(len(pictures))
    for start in range(0, len(order) - side * side + 1, side * side):
        yield mosaic(rng, [pictures[i] for i in order[start : start + side * side]], side)


def mosaic(rng: np.random.Generator, pictures: Sequence[tuple[Pixels, Truth]], side: int) -> Sample:
    """Pictures side by side at their own resolution. What is larger than its cell is cut, what is smaller is padded."""
    width, height = CELL[0] * side, CELL[1] * side
    canvas, people, parts = np.full((height, width, 3), PADDING, np.uint8), [], []
    rows = _seams(rng, CELL[1], side)
    for row in range(side):
        columns = _seams(rng, CELL[0], side)
        for column in range(side):
            picture, boxes = pictures[row * side + column]
            cell = np.array([columns[column], rows[row], columns[column + 1], rows[row + 1]])
            size, room = np.array(picture.shape[1::-1]), cell[2:] - cell[:2]
            shift = rng.integers(np.minimum(0, room - size), np.maximum(0, room - size) + 1)
            first, last = np.maximum(0, -shift), np.minimum(size, room - shift)  # of the picture, in its own pixels
            part = picture[first[1] : last[1], first[0] : last[0]]
            at = cell[:2] + shift
            canvas[at[1] + first[1] : at[1] + last[1], at[0] + first[0] : at[0] + last[0]] = part
            clipped = np.clip(boxes, np.tile(first, 2), np.tile(last, 2))
            people.append((clipped + np.tile(at, 2))[_areas(clipped) >= VISIBLE * _areas(boxes)])
            parts.append(jpeg(part))
    return Sample(jpeg(canvas), np.concatenate(people), parts)


def _seams(rng: np.random.Generator, size: int, count: int) -> NDArray[np.intp]:
    most = round(size * JITTER)
    inner = np.arange(1, count) * size + rng.integers(-most, most + 1, count - 1)
    return np.array([0, *inner, size * count], np.intp)


def _areas(boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    areas: NDArray[np.float64] = (boxes[:, 2:4] - boxes[:, :2]).prod(1)
    return areas


def jpeg(picture: Pixels) -> bytes:
    return cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()


def count(detector: Detector, data: bytes, way: str) -> Count:
    """One picture from its bytes to its people."""
    parameters = Parameters(detail="full" if way == OVERLAP_ONLY else way)
    picture = detector.prepare(data, Limits(), parameters)
    (first,) = detector.count([picture], [parameters])
    if way != OVERLAP_ONLY:
        return detector.look_closer(picture, first, parameters, Budget(Limits.looks))
    with mock.patch("serving.detector.merge", merge_by_overlap):
        return detector.look_closer(picture, first, parameters, Budget(Limits.looks))


def merge_by_overlap(seen: Sequence[Seen], confidence: float, _: float) -> Boxes:
    """What is usually done with tiles: drop what overlaps a better box by 0.6 of the smaller area."""
    boxes = np.concatenate([one.boxes for one in seen])
    boxes = boxes[np.argsort(-boxes[:, 4], kind="stable")]
    boxes = boxes[boxes[:, 4] >= confidence]
    kept: list[int] = []
    for i, box in enumerate(boxes):
        others = boxes[kept]
        sides = np.minimum(box[2:4], others[:, 2:4]) - np.maximum(box[:2], others[:, :2])
        shared = np.clip(sides, 0, None).prod(1)
        if not (shared > 0.6 * np.minimum(_areas(box[None]), _areas(others))).any():
            kept.append(i)
    return boxes[kept]


def tally(into: Tally, sample: Sample, counted: Count, cpu: float) -> None:
    into.pictures += 1
    into.people += len(sample.people)
    into.found += len(counted.people)
    into.error += abs(len(counted.people) - len(sample.people))
    into.right += rightly_found(np.array([p.box for p in counted.people]).reshape(-1, 4), sample.people)
    into.looks += counted.looks
    into.cpu += cpu


def rightly_found(boxes: NDArray[np.float64], people: Truth) -> int:
    """People who have a box with an IoU of at least 0.5, each box for one of them. boxes: best first."""
    left = list(range(len(people)))
    for box in boxes:
        labels = people[left]
        sides = np.minimum(box[2:], labels[:, 2:]) - np.maximum(box[:2], labels[:, :2])
        shared = np.clip(sides, 0, None).prod(1)
        overlap = shared / np.maximum(_areas(box[None]) + _areas(labels) - shared, 1e-9)
        if len(left) and overlap.max() >= 0.5:
            del left[int(overlap.argmax())]
    return len(people) - len(left)


def measure(detector: Detector, samples: Sequence[Sample]) -> dict[str, Tally]:
    """Every way of counting, on every sample; they take turns, so that a busy machine disturbs all of them."""
    tallies = {way: Tally() for way in ((ALONE, *WAYS) if samples[0].parts else WAYS)}
    for sample in samples:
        for way in WAYS:
            began = time.process_time()
            counted = count(detector, sample.data, way)
            tally(tallies[way], sample, counted, time.process_time() - began)
        if sample.parts:
            began = time.process_time()
            parts = [count(detector, part, "fast") for part in sample.parts]
            people = [person for part in parts for person in part.people]
            # Their boxes are in the parts' pixels, so that they cannot be compared with the labels.
            tally(tallies[ALONE], sample, Count(people, 0, 0, len(parts)), time.process_time() - began)
            tallies[ALONE].right = 0
    return tallies


def cost_of_auto(detector: Detector, samples: Sequence[Sample], rounds: int = 5) -> float:
    """CPU time of auto, of fast's, over a set: the median of rounds in which they take turns picture by picture."""
    ratios = []
    for _ in range(rounds):
        spent = {"fast": 0.0, "auto": 0.0}
        for i, sample in enumerate(samples):
            for way in ("fast", "auto") if i % 2 else ("auto", "fast"):
                began = time.process_time()
                count(detector, sample.data, way)
                spent[way] += time.process_time() - began
        ratios.append(spent["auto"] / spent["fast"])
    return statistics.median(ratios)


def gains(rows: dict[str, dict[str, float]]) -> dict[str, float]:
    """What auto keeps of full's gain over fast, and of its looks."""

    def kept(what: str) -> float:
        return (rows["auto"][what] - rows["fast"][what]) / (rows["full"][what] - rows["fast"][what])

    return {what: kept(what) for what in ("error", "found", "recall")} | {
        "looks": rows["auto"]["looks"] / rows["full"]["looks"]
    }


def table(result: dict[str, Any]) -> str:
    lines = []
    for model, sets in result.items():
        for title, one in sets.items():
            lines += [f"{model}, {title}: {one['pictures']} pictures, {one['people']} people"]
            lines += [f"  {'':30}{'found':>8}{'error':>8}{'recall':>8}{'precision':>11}{'looks':>7}{'CPU ms':>9}"]
            for way, row in one["ways"].items():
                right = "" if way == ALONE else f"{row['recall']:8.3f}{row['precision']:11.3f}"
                lines += [
                    f"  {way:30}{row['found']:8.3f}{row['error']:8.3f}{right:19}{row['looks']:7.1f}{row['cpu ms']:9.0f}"
                ]
            if kept := one.get("auto of full"):
                lines += [
                    f"  auto keeps of full's gain in error {kept['error']:.0%}, in people found {kept['found']:.0%}, "
                    f"in recall {kept['recall']:.0%}, with {kept['looks']:.0%} of its looks"
                ]
            if "auto to fast" in one:
                lines += [f"  CPU time of auto, of fast's: {one['auto to fast']:.3f}"]
            lines += [""]
    lines += ["found, error, recall: of the labelled people; error: absolute errors of the pictures' counts, summed"]
    return "\n".join(lines) + "\n"


def plot(result: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    titles = list(next(iter(result.values())))
    figure, axes = pyplot.subplots(2, len(titles), figsize=(4 * len(titles), 7), layout="constrained", squeeze=False)
    for column, title in enumerate(titles):
        for axis, cost in zip(axes[:, column], ("looks", "cpu ms"), strict=True):
            for model, sets in result.items():
                ways = {way: row for way, row in sets[title]["ways"].items() if way in DETAILS}
                costs, errors = [row[cost] for row in ways.values()], [row["error"] for row in ways.values()]
                order = np.argsort(costs)
                axis.plot([costs[i] for i in order], [errors[i] for i in order], "o-", label=model)
                for way, x, y in zip(ways, costs, errors, strict=True):
                    axis.annotate(way, (x, y), textcoords="offset points", xytext=(4, 4))
            axis.set(title=title, xlabel=cost + " a picture", ylabel="count error, of the people", ylim=(0, None))
            axis.set_xscale("log")
            axis.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", nargs="+", default=["yolov5n"], help="published names, or paths of checkpoints")
    parser.add_argument("--seeds", type=int, default=6, help="times that the pictures are put into mosaics")
    parser.add_argument("--half", choices=["chosen-on", "reported", "all"], default="reported")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    pictures = labelled({"chosen-on": 0, "reported": 1, "all": None}[arguments.half])
    sets: dict[str, Callable[[], list[Sample]]] = {
        "single": lambda: [single(*one) for one in pictures],
        "mosaics 3×3": lambda: [m for seed in range(arguments.seeds) for m in mosaics(pictures, 3, 100 + seed)],
        "mosaics 5×5": lambda: [m for seed in range(arguments.seeds) for m in mosaics(pictures, 5, 100 + seed)],
        "enlarged 3×": lambda: [single(*one, 3) for one in pictures],
    }
    result: dict[str, Any] = {}
    for weights in arguments.weights:
        detector = Detector(find_weights(weights))
        count(detector, single(*pictures[0]).data, "fast")  # the first one is slower
        result[detector.model["name"]] = measured = {}
        for title, make in sets.items():
            samples = make()
            tallies = measure(detector, samples)
            rows = {way: one.row() for way, one in tallies.items()}
            people = tallies["fast"].people
            measured[title] = {"pictures": len(samples), "people": people, "ways": rows}
            if samples[0].parts:
                measured[title]["auto of full"] = gains(rows)
            if title == "single":
                measured[title]["auto to fast"] = cost_of_auto(detector, samples)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "crowds.json").write_text(json.dumps(result, indent=1) + "\n")
    text = table(result)
    (RESULTS / "crowds.txt").write_text(text)
    print(text)
    plot(result, RESULTS / "crowds.png")
    print(f"plot: {RESULTS / 'crowds.png'}")


if __name__ == "__main__":
    main()
