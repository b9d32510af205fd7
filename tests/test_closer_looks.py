"""`detail` and `grid`: what is decoded, looked at, counted, limited, told and drawn for a picture."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yolo_checkpoint
from helpers import encode
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image

from serving import pictures
from serving.contract import Limits, Parameters, Person
from serving.detector import TOGETHER, Count, Detector, choose_people, decode_head
from serving.looks import Budget, Look, full_looks
from serving.pictures import PADDING, Letterbox, PictureError, closer_look, letterbox

FAST, FULL, AUTO = (Parameters(detail=detail) for detail in ("fast", "full", "auto"))
SQUARES = 30


@pytest.fixture(scope="module")
def detector(checkpoint: Path) -> Detector:
    return Detector(checkpoint)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Detector:
    """Sees white squares of 16 pixels as people; where they are much smaller, it sees nothing."""
    file = tmp_path_factory.mktemp("tiny") / "squares.pt"
    return Detector(yolo_checkpoint.write(file, yolo_checkpoint.make_seeing(["person"], "person")))


def field(width: int = 1920, height: int = 1440) -> Image.Image:
    """A picture with squares of 16 pixels every 300 pixels, some of them on the seams of tiles."""
    pixels = np.zeros((height, width), np.uint8)
    for x in range(100, width - 100, 300):
        for y in range(100, height - 100, 300):
            pixels[y - 8 : y + 8, x - 8 : x + 8] = 255
    return Image.fromarray(pixels).convert("RGB")


def crowd(bus: bytes) -> bytes:
    """The same four people 144 times, 2592×1944."""
    picture = Image.open(io.BytesIO(bus)).resize((162, 216), Image.Resampling.BOX)
    canvas = Image.new("RGB", (2592, 1944))
    for x in range(0, 2592, 162):
        for y in range(0, 1944, 216):
            canvas.paste(picture, (x, y))
    return encode(canvas)


def count(
    detector: Detector, data: bytes, parameters: Parameters, most: int = Limits.looks, seconds: float = math.inf
) -> Count:
    box = detector.prepare(data, Limits(), parameters)
    (first,) = detector.count([box], [parameters])
    return detector.look_closer(box, first, parameters, Budget(most, seconds))


# What `fast` answers


@pytest.mark.parametrize("name", ["bus.jpg", "zidane.jpg"])
def test_fast_is_one_look_at_the_whole_picture_to_the_last_bit(detector: Detector, data: Path, name: str) -> None:
    """Nothing of closer looks touches it. The other details begin with the same look."""
    content = (data / "people" / name).read_bytes()
    box = letterbox(content)
    with torch.inference_mode():
        logits = detector._forward(torch.from_numpy(box.pixels[None]))
    for confidence in (0.25, 0.6):
        parameters = Parameters(detail="fast", confidence=confidence)
        candidates = decode_head([level[0] for level in logits], detector.head, confidence)
        expected = choose_people(candidates, box, parameters)
        assert count(detector, content, parameters).people == expected
        for detail in ("full", "auto"):
            closer = Parameters(detail=detail, confidence=confidence)
            again = detector.prepare(content, Limits(), closer)
            np.testing.assert_array_equal(again.pixels, box.pixels)
            (first,) = detector.count([again], [closer])
            assert first.people == expected


def test_a_picture_as_small_as_a_look_has_one(detector: Detector, bus: bytes) -> None:
    picture = Image.open(io.BytesIO(bus)).resize((480, 640))
    counts = [count(detector, encode(picture), parameters) for parameters in (FAST, FULL, AUTO)]
    assert counts[0] == counts[1] == counts[2]
    assert [one.looks for one in counts] == [1, 1, 1]


# What closer looks find


def test_tiles_find_what_is_too_small_in_the_whole_picture(tiny: Detector) -> None:
    data = encode(field())
    assert len(count(tiny, data, FAST).people) == 0
    full = count(tiny, data, FULL)
    assert (len(full.people), full.looks, full.note) == (SQUARES, 13, "")
    # Boxes are where the squares are.
    feet = sorted(((p.box[0] + p.box[2]) / 2, (p.box[1] + p.box[3]) / 2) for p in full.people)
    expected = sorted((x, y) for x in range(100, 1820, 300) for y in range(100, 1340, 300))
    np.testing.assert_allclose(feet, expected, atol=8)


def test_auto_looks_closer_at_a_crowd_and_not_at_the_rest(detector: Detector, bus: bytes) -> None:
    picture = Image.open(io.BytesIO(bus)).resize((243, 324), Image.Resampling.BOX)
    canvas = Image.new("RGB", (2560, 1920), (PADDING,) * 3)
    for column in range(3):
        for row in range(2):
            canvas.paste(picture, (2560 - 243 * (column + 1), 1920 - 324 * (row + 1)))
    fast, full, auto = (count(detector, encode(canvas), parameters) for parameters in (FAST, FULL, AUTO))
    assert len(fast.people) < len(auto.people)
    assert 19 <= len(auto.people) <= 29  # 24, give or take what the network takes for people
    assert 1 < auto.looks <= full.looks / 2


def test_auto_is_one_look_where_people_are_large(detector: Detector, data: Path) -> None:
    for name, people in (("bus.jpg", 4), ("zidane.jpg", 2)):
        picture = Image.open(data / "people" / name)
        large = encode(picture.resize((picture.width * 3, picture.height * 3)), "JPEG", quality=90)
        auto = count(detector, large, AUTO)
        assert (len(auto.people), auto.looks) == (people, 1)


def test_a_region_holds_for_the_people_of_all_looks(tiny: Detector) -> None:
    left = ((0.0, 0.0), (0.5, 0.0), (0.5, 1.0), (0.0, 1.0))
    found = count(tiny, encode(field()), Parameters(detail="full", region=left)).people
    assert len(found) == SQUARES / 2
    assert all((p.box[0] + p.box[2]) / 2 <= 960 for p in found)


def test_a_gpu_takes_tiles_together(tiny: Detector, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(field(2600, 2000))
    alone = count(tiny, data, FULL)
    shapes = []
    forward = tiny._forward

    def watched(batch: torch.Tensor) -> Sequence[torch.Tensor]:
        shapes.append(tuple(batch.shape))
        return forward(batch)

    monkeypatch.setattr(tiny, "_forward", watched)
    monkeypatch.setattr(tiny, "batches", True)
    together = count(tiny, data, FULL)
    assert together == alone
    tiles = len(full_looks(2600, 2000))
    assert tiles > TOGETHER
    assert [shape[0] for shape in shapes] == [1, TOGETHER, tiles - TOGETHER]


# A part of a picture


def test_a_closer_look_shows_the_picture_s_own_pixels() -> None:
    own = np.random.default_rng(0).integers(0, 255, (900, 1500, 3), np.uint8)
    box = closer_look(own, Look(100, 200, 740, 840, 1.0))
    np.testing.assert_array_equal(box.pixels, own[200:840, 100:740])
    assert (box.width, box.height, box.scale, box.left, box.top) == (640, 640, (1, 1), 0, 0)
    small = closer_look(own, Look(0, 0, 1200, 900, 0.5))
    assert small.pixels.shape == (480, 608, 3)
    assert (small.left, small.top, small.scale) == (4, 15, (0.5, 0.5))
    assert (small.pixels[:15] == PADDING).all()


@pytest.mark.parametrize(
    ("kind", "detail", "sizes"),
    [
        ("JPEG", "fast", ["small"]), ("JPEG", "auto", ["small"]), ("JPEG", "full", ["small", "own"]),
        ("PNG", "fast", ["own"]), ("PNG", "auto", ["own"]), ("PNG", "full", ["own"]),
    ],
)  # fmt: skip
def test_a_picture_is_decoded_once_at_each_size_that_is_needed(
    tiny: Detector, monkeypatch: pytest.MonkeyPatch, kind: str, detail: str, sizes: list[str]
) -> None:
    decoded = []
    decode = pictures._Opened.decode

    def watched(self: Any, at_least: Any) -> pictures.Pixels:
        pixels = decode(self, at_least)
        decoded.append("own" if pixels.shape == (1500, 2000, 3) else "small")
        return pixels

    monkeypatch.setattr(pictures._Opened, "decode", watched)
    count(tiny, encode(Image.new("RGB", (2000, 1500)), kind), Parameters(detail=detail))
    assert decoded == sizes


def test_auto_decodes_once_for_the_looks_of_every_scale(detector: Detector, bus: bytes) -> None:
    picture = Image.open(io.BytesIO(bus)).resize((162, 216), Image.Resampling.BOX)
    canvas = Image.new("RGB", (2592, 1944))
    for x in range(0, 2592, 162):
        canvas.paste(picture, (x, 1700))
    box = detector.prepare(encode(canvas, "JPEG", quality=95), Limits(), AUTO)
    own, decoded = box.own, []
    assert own is not None

    def watched() -> pictures.Pixels:
        decoded.append(1)
        return own()

    (first,) = detector.count([box], [AUTO])
    seen = detector.look_closer(replace(box, own=watched), first, AUTO, Budget(Limits.looks))
    assert seen.looks > 3
    assert decoded == [1]


@pytest.mark.parametrize("orientation", [1, 6])
def test_tiles_are_of_the_upright_picture(tiny: Detector, orientation: int) -> None:
    picture = Image.new("RGB", (1920, 1440))
    picture.paste((255, 255, 255), (1600, 100, 1616, 116))
    stored = picture.transpose(Image.Transpose.ROTATE_90) if orientation == 6 else picture
    exif = Image.Exif()
    exif[0x0112] = orientation
    for kind in ("JPEG", "PNG"):
        (person,) = count(tiny, encode(stored, kind, exif=exif.tobytes()), FULL).people
        np.testing.assert_allclose(person.box, (1576, 76, 1640, 140), atol=8)


def test_candidates_are_those_who_would_count_at_a_lower_confidence(detector: Detector, bus: bytes) -> None:
    """They are listed, and change neither the count nor the people."""
    for data, detail in ((bus, "fast"), (crowd(bus), "full")):
        sure = Parameters(confidence=0.6, detail=detail)
        few, more = (count(detector, data, replace(sure, candidates=least)) for least in (0.6, 0.3))
        assert few.people == more.people == count(detector, data, sure).people
        assert few.candidates == []
        assert more.candidates
        assert all(0.3 <= person.confidence < 0.6 for person in more.candidates)
        if detail == "fast":
            assert more.people + more.candidates == count(detector, data, replace(sure, confidence=0.3)).people
        answer = more.as_json(replace(sure, candidates=0.3, max_people=1), {})
        assert (answer["count"], len(answer["candidates"])) == (len(more.people), len(more.candidates))
        assert "candidates" not in more.as_json(sure, {})


def test_candidates_stand_in_the_region_too(detector: Detector, bus: bytes) -> None:
    left = ((0.0, 0.0), (0.5, 0.0), (0.5, 1.0), (0.0, 1.0))
    sure = Parameters(confidence=0.86, candidates=0.25, detail="fast")
    everywhere, there = count(detector, bus, sure), count(detector, bus, replace(sure, region=left))
    assert 0 < len(there.candidates) < len(everywhere.candidates)


# Limits


def test_full_is_refused_where_it_takes_more_looks_than_are_left(tiny: Detector) -> None:
    data = encode(field())
    with pytest.raises(PictureError, match=r"12 closer looks at a picture of 1920×1440, and 11 .* HEADCOUNT_MAX_LOOKS"):
        count(tiny, data, FULL, most=11)
    assert count(tiny, data, FULL, most=12).looks == 13


def test_auto_takes_as_many_looks_as_it_may_and_says_that_there_is_more(detector: Detector, bus: bytes) -> None:
    data = crowd(bus)
    auto = count(detector, data, AUTO)
    assert auto.note == ""
    little = count(detector, data, AUTO, most=2)
    assert little.looks == 3
    assert "more places than 2 closer looks could reach; detail=full takes 20" in little.note
    assert little.as_json(AUTO, {})["note"] == little.note
    assert len(little.people) < len(auto.people)


def test_the_time_for_closer_looks_ends_between_two_of_them(detector: Detector, tiny: Detector, bus: bytes) -> None:
    """`full` is refused, because its count would be wrong; `auto` says that there is more."""
    data = encode(field())
    for seconds, after in ((0, 0), (1e-9, 1)):
        with pytest.raises(PictureError, match=rf"the time for them was over after {after}: .* HEADCOUNT_LOOK_SECONDS"):
            count(tiny, data, FULL, seconds=seconds)
        auto = count(detector, crowd(bus), AUTO, seconds=seconds)
        assert auto.looks == 1 + after
        assert f"in more places than {after} closer looks could reach" in auto.note


# Cells of a grid


def test_people_are_counted_in_the_cell_in_which_they_stand() -> None:
    """By the middle of the lower edge, as for a region; on an edge of the picture, in the last cell."""
    people = [Person(box, 0.9) for box in ((10, 0, 30, 60), (10, 0, 30, 40), (80, 50, 100, 100), (90, 50, 110, 100))]
    counted = Count(people, 100, 100)  # the last one's foot point is on the corner
    assert counted.in_cells(2, 2) == [[1, 0], [1, 2]]
    answer = counted.as_json(Parameters(grid=(2, 1), max_people=1), {})
    assert (answer["grid"], answer["count"], len(answer["people"])) == ([[2, 2]], 4, 1)
    assert "grid" not in counted.as_json(Parameters(), {})
    assert Count([], 100, 100).in_cells(3, 2) == [[0, 0, 0], [0, 0, 0]]


@given(
    st.integers(1, 4), st.integers(1, 4),
    st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99), st.integers(1, 50), st.integers(1, 50)), max_size=8),
)  # fmt: skip
def test_a_cell_has_the_people_whom_a_region_of_its_shape_has(
    columns: int, rows: int, given: list[tuple[int, int, int, int]]
) -> None:
    candidates = np.array([(x, y, w, h, 0.9 - i / 100) for i, (x, y, w, h) in enumerate(given)]).reshape(-1, 5)
    picture = Letterbox(np.empty((0, 0, 3), np.uint8), 160, 160, (1, 1), 0, 0)
    feet = candidates[:, :2] + candidates[:, 2:4] * [0.5, 1]
    # On a line between two cells, one is in both regions.
    assume(not ((feet * columns % 160 == 0)[:, 0] | (feet * rows % 160 == 0)[:, 1]).any())
    cells = Count(choose_people(candidates, picture, Parameters(iou=1)), 160, 160).in_cells(columns, rows)
    for i in range(columns):
        for j in range(rows):
            left, top, right, bottom = i / columns, j / rows, (i + 1) / columns, (j + 1) / rows
            region = ((left, top), (right, top), (right, bottom), (left, bottom))
            assert len(choose_people(candidates, picture, Parameters(iou=1, region=region))) == cells[j][i]


# Drawing


def test_small_boxes_are_drawn_so_that_one_still_sees_who_is_in_them() -> None:
    picture = encode(Image.new("RGB", (4000, 3000), "white"))
    small, large, flat = (1000, 1000, 1014, 1030), (2000, 1000, 2900, 2800), (1000, 2000, 1900, 2030)
    drawn = np.asarray(Image.open(io.BytesIO(pictures.annotate(picture, [small, large, flat], ["0.90", "0.80", ""]))))

    def green(x: int, y: int) -> bool:
        red, green, blue = map(int, drawn[y, x])
        return green > red + 60 and green > blue + 40

    assert (drawn[1001:1029, 1001:1013] > 200).all(), "the inside is free"
    assert green(999, 1015), "the line is around it"
    assert not green(990, 1015), "and thin"
    assert not green(1005, 985), "there is no label, which nobody could read"
    assert green(1996, 2000), "a large box has a thick line"
    assert not green(1400, 1996), "and a flat one a thin line"
    assert green(2005, 985), "and a label"
