"""From the head's logits to people: YOLOv5's rules derived anew, and regions as shapely sees them."""

from __future__ import annotations

import math
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from shapely import Point, Polygon
from test_contract import stars

from serving.contract import Parameters, Person
from serving.detector import MAX_CANDIDATES, Count, best_device, best_precision, choose_people, decode_head
from serving.network import Head
from serving.pictures import Letterbox

Candidate = tuple[float, float, float, float, float]  # left, top, right, bottom, confidence


def letterboxed(
    width: int = 1000, height: int = 1000, scale: tuple[float, float] = (1, 1), left: int = 0, top: int = 0
) -> Letterbox:
    return Letterbox(np.empty((0, 0, 3), np.uint8), width, height, scale, left, top)


def boxes(*found: Candidate) -> NDArray[np.float64]:
    """Candidates as decode_head makes them."""
    return np.array([(left, top, right - left, bottom - top, sure) for left, top, right, bottom, sure in found])


def overlap(a: Candidate, b: Candidate) -> float:
    """Intersection over union."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0
    both = width * height
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def detections(logits: list[Any], head: Head, confidence: float) -> list[Candidate]:
    """YOLOv5 v7.0's models/yolo.py (Detect.forward) and the filter of its non_max_suppression, one cell at a time."""
    found = []
    for level, stride, anchors in zip(logits, head.strides, head.anchors.tolist(), strict=True):
        cells = level.reshape(len(anchors), 6, *level.shape[1:]).tolist()
        for anchor, (anchor_width, anchor_height) in zip(cells, anchors, strict=True):
            for y in range(len(anchor[0])):
                for x in range(len(anchor[0][0])):
                    tx, ty, tw, th, objectness, person = (sigmoid(anchor[k][y][x]) for k in range(6))
                    sure = objectness * person
                    centre_x, centre_y = (tx * 2 - 0.5 + x) * stride, (ty * 2 - 0.5 + y) * stride
                    width, height = (tw * 2) ** 2 * anchor_width, (th * 2) ** 2 * anchor_height
                    if objectness > confidence and sure > confidence:
                        left, top = centre_x - width / 2, centre_y - height / 2
                        found.append((left, top, left + width, top + height, sure))
    return sorted(found, key=lambda one: -one[4])


def suppressed(found: list[Candidate], iou: float) -> list[Candidate]:
    """Greedy suppression: of boxes that overlap by more than iou, the best one is kept."""
    kept: list[Candidate] = []
    for one in found:
        if all(overlap(one, better) <= iou for better in kept):
            kept.append(one)
    return kept


@st.composite
def heads(draw: st.DrawFn) -> tuple[list[torch.Tensor], Head]:
    """Logits of a small picture in which half of the cells have an object."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    height, width = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    logits = []
    for factor in (2, 1):
        level = rng.normal(0, 2, (3, 6, height * factor, width * factor))
        level[:, 4:] += rng.choice([-3.0, 2.0], (3, 1, height * factor, width * factor))
        logits.append(torch.from_numpy(level.reshape(18, height * factor, width * factor)).float())
    return logits, Head((8, 16), torch.from_numpy(rng.uniform(5, 40, (2, 3, 2))).float(), ("person",))


@given(heads(), st.floats(0.05, 0.95), st.sampled_from((0.0, 0.2, 0.45, 0.7, 1.0)))
def test_people_are_chosen_as_yolov5_chooses_them(
    case: tuple[list[torch.Tensor], Head], confidence: float, iou: float
) -> None:
    logits, head = case
    found = detections(logits, head, confidence)
    # Ours are of single precision: leave out what rounding decides.
    everything = detections(logits, head, 0)
    assume(all(abs(one[4] - confidence) > 1e-5 for one in everything))
    assume(all(a[4] - b[4] > 1e-6 for a, b in pairwise(found)))
    assume(all(abs(overlap(a, b) - iou) > 1e-4 for a, b in combinations(found, 2) if overlap(a, b) > 0))
    candidates = decode_head(logits, head, confidence)
    assert len(candidates) == len(found)
    people = choose_people(candidates, letterboxed(10_000, 10_000, left=-1000, top=-1000), Parameters(iou=iou))
    expected = suppressed(found, iou)
    assert len(people) == len(expected)
    for person, one in zip(people, expected, strict=True):
        assert person.confidence == pytest.approx(one[4], abs=1e-4)
        np.testing.assert_allclose(np.array(person.box) - 1000, one[:4], atol=0.05)


def test_the_overlap_decides_whether_two_boxes_are_one_person() -> None:
    found = boxes((0, 0, 100, 100, 0.9), (0, 50, 100, 150, 0.8), (0, 300, 100, 400, 0.7))  # the first two: a third
    for iou, count in ((0, 2), (0.3, 2), (0.34, 3), (1, 3)):
        assert len(choose_people(found, letterboxed(), Parameters(iou=iou))) == count
    assert choose_people(found[:0], letterboxed(), Parameters()) == []


def test_boxes_are_in_the_picture_s_own_pixels() -> None:
    (person,) = choose_people(boxes((10, 40, 60, 140, 0.9)), letterboxed(200, 200, (0.5, 0.25), 5, 20), Parameters())
    assert person.box == (10, 80, 110, 200), "cut off at the picture's edge"


def test_candidates_are_capped_at_the_best() -> None:
    cells = torch.full((18, 40, 40), -9.0)
    cells[4], cells[5] = torch.linspace(0, 9, 1600).reshape(40, 40), 9
    cells[10], cells[11] = torch.linspace(9, 18, 1600).reshape(40, 40), 9
    head = Head((8,), torch.ones(1, 3, 2), ("person",))
    found = decode_head([cells], head, 0.01)
    assert len(found) == MAX_CANDIDATES < 3200
    assert (np.diff(found[:, 4]) <= 0).all()
    assert found[-1, 4] > sigmoid(0) * sigmoid(9), "the worst were left out"


def test_a_person_stands_where_the_feet_are() -> None:
    """A person is in a region if the foot point is: the middle of the box's lower edge, not its centre."""
    person = boxes((100, 100, 200, 900, 0.9))
    lower = ((0.0, 0.8), (1.0, 0.8), (1.0, 1.0), (0.0, 1.0))
    upper = ((0.0, 0.0), (1.0, 0.0), (1.0, 0.8), (0.0, 0.8))
    right = ((0.16, 0.0), (1.0, 0.0), (1.0, 1.0), (0.16, 1.0))
    counts = [len(choose_people(person, letterboxed(), Parameters(region=r))) for r in (lower, upper, right)]
    assert counts == [1, 0, 0]


@settings(suppress_health_check=[HealthCheck.filter_too_much])  # feet on an edge and boxes without a size are frequent
@given(
    stars(), st.integers(10, 5000), st.integers(10, 5000),
    st.lists(st.tuples(*[st.floats(0, 1)] * 4), min_size=1, max_size=5),
)  # fmt: skip
def test_regions_are_as_shapely_sees_them(
    region: list[tuple[float, float]], width: int, height: int, shares: list[tuple[float, ...]]
) -> None:
    area = Polygon([(x * width, y * height) for x, y in region])
    found: list[Candidate] = []
    for i, (x, y, w, h) in enumerate(shares):
        left, top = x * width, y * height
        found.append((left, top, left + w * (width - left), top + h * (height - top), 0.9 - 0.1 * i))
    feet = [Point((left + right) / 2, bottom) for left, _, right, bottom, _ in found]
    assume(all(area.exterior.distance(foot) > 0.01 for foot in feet))  # OpenCV takes single precision
    assume(all(right - left > 0.01 and bottom - top > 0.01 for left, top, right, bottom, _ in found))
    people = choose_people(boxes(*found), letterboxed(width, height), Parameters(iou=1, region=tuple(region)))
    expected = [sure for (*_, sure), foot in zip(found, feet, strict=True) if area.covers(foot)]
    assert [person.confidence for person in people] == expected


def test_a_gpu_is_used_where_there_is_one_and_it_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    for there, accelerator, device in ((True, "", "cuda:1"), (True, "cpu", "cpu"), (False, "", "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        monkeypatch.setenv("HEADCOUNT_ACCELERATOR", accelerator)
        assert best_device(1) == torch.device(device)
    assert best_precision(torch.device("cuda:0")) == torch.float16


def test_max_people_caps_the_list_and_never_the_count() -> None:
    people = [Person((0, 0, 1, 1), 0.9), Person((5, 5, 9, 9), 0.8)]
    for most, listed in ((None, 2), (0, 0), (1, 1), (5, 2)):
        answer = Count(people, 10, 10).as_json(Parameters(max_people=most), {"name": "n"})
        assert (answer["count"], len(answer["people"])) == (2, listed)
