"""Closer looks: where they are taken, and that all of them together count each person once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from serving import looks
from serving.contract import Limits
from serving.looks import (
    AUTO_LOOKS,
    OVERLAP,
    TILE,
    Boxes,
    Look,
    Seen,
    full_looks,
    look_where_promising,
    merge,
    promising,
    scales,
    tiles,
    whole,
)

Box = tuple[float, float, float, float]
SIDES = st.integers(1, 9000)


def sahi_slices(size: int) -> int:
    """How many slices SAHI's get_slice_bboxes makes along one axis, by its rule: walk on until the end is reached."""
    start, count = 0, 1
    while start + TILE < size:
        start += TILE - OVERLAP
        count += 1
    return count


@given(SIDES, SIDES)
def test_tiles_are_as_many_as_sahi_s_and_overlap_by_its_fifth(width: int, height: int) -> None:
    found = tiles(width, height, 1.0)
    assert len(found) == sahi_slices(width) * sahi_slices(height)
    assert len(set(found)) == len(found)
    for first, last, size in ((0, 2, width), (1, 3, height)):
        spans = sorted({(look[first], look[last]) for look in found})
        assert spans[0][0] == 0
        assert spans[-1][1] == size
        assert all(last - first == min(TILE, size) for first, last in spans)
        # So that nobody of up to OVERLAP pixels is cut by all tiles.
        assert all(before[1] - after[0] >= OVERLAP for before, after in pairwise(spans))


@given(SIDES, SIDES, st.floats(1.5, 10))
def test_scales_end_at_the_picture_s_own_pixels_and_never_beyond(width: int, height: int, step: float) -> None:
    found = scales(width, height, step)
    assert bool(found) == (max(width, height) > TILE)
    steps = [TILE / max(width, height), *found]
    if found:
        assert found[-1] == 1
        assert all(before < after <= before * step * 1.000001 for before, after in pairwise(steps))


def test_what_a_full_look_costs() -> None:
    assert full_looks(640, 480) == []
    assert len(full_looks(641, 640)) == 2
    assert len(full_looks(1920, 1440)) == 12
    assert len(full_looks(4000, 3000)) == 48
    fifty_megapixels = full_looks(8160, 6120)
    assert {look.scale < 1 for look in fifty_megapixels} == {True, False}, "people may be larger than a tile"
    assert len(fifty_megapixels) <= Limits.looks


# Merging: synthetic boxes through the function that merges


def seen(look: Look, *boxes: tuple[float, float, float, float, float]) -> Seen:
    return Seen(look, np.array(boxes, float).reshape(-1, 5))


PICTURE = whole(4000, 2000)
LEFT, RIGHT = Look(0, 0, 640, 640, 1.0), Look(512, 0, 1152, 640, 1.0)
BELOW_LEFT, BELOW_RIGHT = Look(0, 512, 640, 1152, 1.0), Look(512, 512, 1152, 1152, 1.0)


def merged(*found: Seen, confidence: float = 0.25, iou: float = 0.45) -> list[tuple[float, ...]]:
    return [tuple(box) for box in merge([*found], confidence, iou).tolist()]


def test_one_look_alone_is_left_as_it_is() -> None:
    boxes = ((10, 10, 50, 110, 0.9), (30, 10, 70, 110, 0.5), (0, 0, 3900, 1900, 0.3))
    assert merged(seen(PICTURE, *boxes, (5, 5, 9, 9, 0.1))) == list(boxes)


def test_a_person_whom_two_tiles_have_whole_counts_once() -> None:
    found = merged(seen(PICTURE), seen(LEFT, (530, 100, 570, 200, 0.7)), seen(RIGHT, (531, 99, 572, 202, 0.8)))
    assert found == [(531, 99, 572, 202, 0.8)]


def test_a_person_cut_by_a_seam_gives_way_to_the_whole_one() -> None:
    """Although the piece is more certain."""
    found = merged(
        seen(PICTURE), seen(LEFT, (560, 100, 640, 300, 0.9)), seen(RIGHT, (560, 100, 680, 300, 0.4))
    )  # fmt: skip
    assert found == [(560, 100, 680, 300, 0.4)]


def test_a_person_larger_than_a_tile_counts_once() -> None:
    """Who is cut by four tiles, each of which is surer of its piece than the look at the whole picture is."""
    person = (300, 200, 900, 950, 0.3)
    pieces = [seen(look, (*cut(person, look), 0.9)) for look in (LEFT, RIGHT, BELOW_LEFT, BELOW_RIGHT)]
    assert merged(seen(PICTURE, person), *pieces) == [person]


def test_a_person_of_whom_no_look_has_the_whole_is_put_together() -> None:
    """On two tiles, and on four, of which those that lie crosswise share a corner only."""
    for person, touching in (
        ((500, 100, 660, 300), [LEFT, RIGHT]),
        ((500, 500, 660, 660), [LEFT, BELOW_RIGHT, RIGHT, BELOW_LEFT]),
    ):
        sure = (0.5, 0.6, 0.7, 0.8)
        pieces = [seen(look, (*cut(person, look), one)) for look, one in zip(touching, sure, strict=False)]
        assert merged(seen(PICTURE), *pieces) == [(*person, sure[len(touching) - 1])]


def cut(box: Sequence[float], look: Look) -> Box:
    return max(box[0], look.left), max(box[1], look.top), min(box[2], look.right), min(box[3], look.bottom)


def test_people_beside_each_other_at_a_seam_stay_two() -> None:
    one, other = (520, 100, 560, 200), (565, 100, 605, 200)
    found = merged(seen(PICTURE), *(seen(look, (*one, 0.8), (*other, 0.7)) for look in (LEFT, RIGHT)))
    assert found == [(*one, 0.8), (*other, 0.7)]


def test_a_child_before_an_adult_stays() -> None:
    """One look told them apart; merging by intersection over the smaller area would make them one."""
    adult, child = (520, 100, 620, 400), (540, 250, 590, 400)
    found = merged(seen(PICTURE), *(seen(look, (*adult, 0.8), (*child, 0.7)) for look in (LEFT, RIGHT)))
    assert found == [(*adult, 0.8), (*child, 0.7)]


def test_a_large_box_of_a_closer_look_needs_a_candidate_in_the_picture() -> None:
    """A wall in a tile may look like somebody; the look at the whole picture sees who is that large."""
    large, small = (100, 100, 400, 500, 0.6), (450, 100, 480, 180, 0.6)  # 400 pixels are 64 in the picture's look
    tile = seen(LEFT, large, small)
    assert merged(seen(PICTURE), tile) == [small]
    assert merged(seen(PICTURE, (90, 110, 400, 510, 0.03)), tile) == [large, small]


def test_a_stricter_overlap_holds_between_looks_too() -> None:
    a, b = (500, 100, 600, 200, 0.8), (540, 100, 640.0 - 10, 200, 0.7)  # an IoU of 0.46
    assert len(merged(seen(PICTURE, a), seen(RIGHT, b), iou=0.9)) == 1
    a, b = (520, 100, 600, 200, 0.8), (570, 100, 630, 200, 0.7)  # of 0.27
    assert [len(merged(seen(PICTURE, a), seen(RIGHT, b), iou=iou)) for iou in (0.2, 0.45)] == [1, 2]


def test_merging_compares_only_boxes_that_share_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of boxes would take so long otherwise that the worker seems stuck."""
    compared: list[int] = []
    overlap = looks._overlap

    def watched(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
        compared.append(len(b))
        return overlap(a, b)

    monkeypatch.setattr(looks, "_overlap", watched)
    crowd = [(x, y, x + 9.0, y + 9.0, 0.5) for x in range(10, 600, 10) for y in range(10, 600, 10)]
    found = merge([seen(PICTURE), seen(LEFT, *crowd)], 0.25, 0.45)
    assert len(found) == len(crowd)
    assert sum(compared) == 0
    again = merge([seen(PICTURE), seen(LEFT, *crowd), seen(Look(0, 0, 640, 640, 1.0), *crowd)], 0.25, 0.45)
    assert len(again) == len(crowd)
    assert sum(compared) == len(crowd)


def test_nothing_seen_is_nobody() -> None:
    assert merged(seen(PICTURE), seen(LEFT), seen(RIGHT)) == []


# The whole way, with an eye that sees what is drawn


class Eye:
    """Sees the parts of rectangles that lie in a look, if they are large enough there, with a confidence by chance."""

    def __init__(self, people: Sequence[Box], seed: int, smallest: float = 8) -> None:
        self.people, self.rng, self.smallest = (
            np.array(people, float).reshape(-1, 4),
            np.random.default_rng(seed),
            smallest,
        )
        self.looks: list[Look] = []

    def __call__(self, looks: Sequence[Look]) -> list[Seen]:
        return [Seen(look, self._see(look)) for look in looks]

    def _see(self, look: Look) -> Boxes:
        self.looks.append(look)
        edges = np.array(look[:4])
        parts = np.hstack((np.maximum(self.people[:, :2], edges[:2]), np.minimum(self.people[:, 2:], edges[2:])))
        sides = (parts[:, 2:] - parts[:, :2]) * look.scale
        parts = parts[(sides >= self.smallest).all(1)]
        off = self.rng.uniform(-0.5, 0.5, parts.shape) / look.scale
        parts = np.clip(parts + off, np.tile(edges[:2], 2), np.tile(edges[2:], 2))
        return np.hstack((parts, self.rng.uniform(0.3, 0.9, (len(parts), 1))))


@st.composite
def crowds(draw: st.DrawFn) -> tuple[int, int, list[Box]]:
    """A picture, and people of every size, anywhere, one beside the other."""
    width, height = draw(st.integers(700, 7000)), draw(st.integers(300, 6000))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    people: list[Box] = []
    for _ in range(draw(st.integers(0, 40))):
        w = math.exp(rng.uniform(math.log(16), math.log(width)))
        h = w * rng.uniform(0.5, 3)
        if h > height:
            continue
        x, y = rng.uniform(0, width - w), rng.uniform(0, height - h)
        apart = 0.3 * w + 20
        if all(x > q[2] + apart or x + w < q[0] - apart or y > q[3] + apart or y + h < q[1] - apart for q in people):
            people.append((x, y, x + w, y + h))
    return width, height, people


@settings(max_examples=300)
@given(crowds(), st.integers(0, 2**32 - 1))
def test_everybody_counts_once_wherever_the_tiles_are(crowd: tuple[int, int, list[Box]], seed: int) -> None:
    width, height, people = crowd
    eye = Eye(people, seed)
    found = merge([*eye([whole(width, height)]), *eye(full_looks(width, height))], 0.25, 0.45)
    assert len(found) == len(people)
    for box in people:
        assert (np.abs(found[:, :4] - box).max(1) <= 0.02 * max(width, height)).any()


@settings(max_examples=100)
@given(crowds(), st.integers(0, 2**32 - 1), st.integers(0, 20))
def test_looking_where_it_is_promising_stays_within_its_limit(
    crowd: tuple[int, int, list[Box]], seed: int, most: int
) -> None:
    width, height, people = crowd
    eye = Eye(people, seed)
    (first,) = eye([whole(width, height)])
    found, more = look_where_promising(first, width, height, 0.25, most, eye)
    assert len(found) == len(eye.looks) <= most + 1
    assert more or look_where_promising(first, width, height, 0.25, AUTO_LOOKS, Eye(people, seed))[1] is False
    # Nobody whom the first look found is lost, and nobody counts twice.
    assert len(first.boxes) <= len(merge(found, 0.25, 0.45)) <= len(people)
    for look in eye.looks:
        assert 0 <= look.left < look.right <= width
        assert 0 <= look.top < look.bottom <= height
        assert max(look.right - look.left, look.bottom - look.top) * look.scale <= TILE + 1


def test_a_look_is_taken_where_there_are_signs_and_nowhere_else() -> None:
    width, height = 4000, 3000
    picture, scale = whole(width, height), 0.4

    def looks(*boxes: tuple[float, float, float, float, float], most: int = 9) -> list[Look]:
        return promising([seen(picture, *boxes)], width, height, scale, 0.25, most)

    few = [(3000 + i * 50, 2000, 3030 + i * 50, 2060, 0.1) for i in range(3)]
    (look,) = looks(*few)
    assert look.left <= 3000
    assert look.right >= 3130
    assert look.top <= 2000
    assert look.bottom >= 2060
    assert looks() == []
    assert looks(few[0]) == [], "one faint candidate may be anything"
    assert looks((1000, 500, 2500, 2900, 0.9)) == [], "a large person is seen well"
    more = [(500 + i * 50, 300, 530 + i * 50, 360, 0.2) for i in range(8)]
    first, second = looks(*few, *more)
    assert first.left <= 500 < 2000 < second.right, "the best comes first"
    assert looks(*few, *more, most=1) == [first]


def test_what_a_closer_look_shows_is_looked_at_again() -> None:
    """People who can be told only at the picture's own scale are found through those whom the look between hints at."""
    width, height = 4000, 3000
    people = [(1000.0 + 60 * i, 1500.0, 1030.0 + 60 * i, 1590.0) for i in range(6)]
    (first,) = Eye(people, 0, smallest=0)([whole(width, height)])
    first.boxes[:, 4] = 0.1

    def see(looks: Sequence[Look]) -> list[Seen]:
        found = Eye(people, 0)(looks)
        for one in found:
            one.boxes[:, 4] = 0.15 if one.look.scale < 1 else 0.8
        return found

    found, more = look_where_promising(first, width, height, 0.25, AUTO_LOOKS, see)
    assert [one.look.scale for one in found] == pytest.approx([0.16, 0.4, 1.0])
    assert not more
    assert len(merge(found, 0.25, 0.45)) == len(people)


@given(st.integers(0, 2**32 - 1), st.integers(0, 30), st.floats(0.01, 1), st.floats(0, 1))
def test_any_boxes_merge(seed: int, count: int, confidence: float, iou: float) -> None:
    rng = np.random.default_rng(seed)
    looks = [PICTURE, LEFT, RIGHT, BELOW_LEFT, BELOW_RIGHT]
    found = []
    for look in looks:
        corners = np.sort(rng.uniform(0, 1, (count, 2, 2)), 1)
        size = np.array([look.right - look.left, look.bottom - look.top])
        boxes = (corners * size + [look.left, look.top]).reshape(-1, 4)
        found.append(Seen(look, np.hstack((boxes, rng.uniform(0, 1, (count, 1))))))
    assume(count == 0 or (found[0].boxes[:, 4] != confidence).all())
    people = merge(found, confidence, iou)
    assert len(people) <= sum((one.boxes[:, 4] >= confidence).sum() for one in found)
    assert (people[:, 4] >= confidence).all()
    assert (np.diff(people[:, 4]) <= 0).all()
    # Whom the look at the whole picture found is never lost, unless another look has the same person better.
    assert len(people) >= min(1, (found[0].boxes[:, 4] >= confidence).sum())
