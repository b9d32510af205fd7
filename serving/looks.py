"""Looks: which parts of a picture the network sees, at which scale, and what all looks together found.

The network sees 640 pixels, so people in a large picture become too small for it. Tiles at the picture's own
resolution, with the whole picture added and all boxes merged, are SAHI (Akyon et al. 2022, https://arxiv.org/abs/2202.06934,
https://github.com/obss/sahi). What differs here:

- Tiles are spread evenly; SAHI moves the last one back over its neighbour.
- SAHI merges by overlap alone. Here boxes of one look never suppress each other again, because that look has already
  told them apart; boxes that are cut by the edge of their tile give way to whole ones, and are joined where no look
  has the whole; and two boxes are compared in the part of the picture that both looks saw.
- A large box of a closer look needs a candidate, however faint, in the look at the whole picture, which sees large
  people well. Tiles of hands, clothes and walls would add people otherwise.
- Pictures beyond 5120 pixels are also seen at scales between, so that people who are larger than a tile, and too small
  in the whole picture, fit into a tile of one of them.
- `promising` chooses tiles by evidence instead of taking all.

Nothing here is enlarged beyond the picture's own pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Boxes = NDArray[np.float64]  # (n, 5): left, top, right, bottom in pixels of the upright picture, confidence

TILE = 640  # pixels that a closer look shows the network, of each side; as the network was trained
OVERLAP = 128  # pixels of the network that neighbouring tiles share, at least: SAHI's 0.2
FULL_STEP = 8.0  # largest ratio between the scales that `full_looks` goes through
AUTO_STEP = 2.5  # likewise for `promising`: what is closer is decided by what was seen one step before
AUTO_LOOKS = 64  # closer looks that `look_where_promising` takes at a picture, at most
AUTO_GAIN = 1.25  # least enlargement for which `promising` looks closer

# The constants below were chosen on one half of coco128, on mosaics and enlarged pictures; `python -m bench.crowds`
# reports on the other half. The results change little around them.
FAINT = 0.02  # confidence of the faintest candidates that count as evidence
WORTH = 0.4  # people a closer look must be expected to add
SAME = 0.4  # intersection over union above which boxes of two looks are one person, in what both looks saw
SAME_CUT = 0.6  # intersection over the smaller area above which a cut box is part of another
LARGE = 48  # pixels in the look at the whole picture: who is larger is seen well there
SUPPORT = 0.3  # intersection over union with the candidate that a large box of a closer look needs
TOUCH = 2  # pixels of the network between a box and the edge that cuts it

MAX_BOXES = 10_000  # more than these are noise; bounds the time that merging takes
_CELLS = 8  # cells of the evidence map along the side of a tile


class Look(NamedTuple):
    """A part of the upright picture in its own pixels, and the network's pixels for each of them."""

    left: int
    top: int
    right: int
    bottom: int
    scale: float


class Seen(NamedTuple):
    """The boxes that one look found, after suppression among themselves, faint candidates included."""

    look: Look
    boxes: Boxes


@dataclass
class Budget:
    """What is left for closer looks at the pictures of a request: their number, and the seconds that they may take."""

    looks: int
    seconds: float = math.inf


def whole(width: int, height: int) -> Look:
    """The look at the whole picture."""
    return Look(0, 0, width, height, TILE / max(width, height))


def scales(width: int, height: int, step: float, least: float = 1.0) -> list[float]:
    """The scales beyond the whole picture's, in equal steps of at most `step`; the last is 1, the picture's own.

    None where the own pixels are fewer than `least` times those of the look at the whole picture.
    """
    ratio = max(width, height) / TILE
    if ratio <= least:
        return []
    steps = math.ceil(math.log(ratio) / math.log(step) - 1e-9)
    return [ratio ** ((i + 1) / steps - 1) for i in range(steps)]


def tiles(width: int, height: int, scale: float) -> list[Look]:
    """Tiles over the whole picture, evenly spread."""
    side = round(TILE / scale)

    def starts(size: int) -> list[int]:
        count = max(1, math.ceil((size - OVERLAP / scale) / (side - OVERLAP / scale)))
        return [round(i * (size - side) / (count - 1)) if count > 1 else 0 for i in range(count)]

    return [
        Look(left, top, min(width, left + side), min(height, top + side), scale)
        for top in starts(height)
        for left in starts(width)
    ]


def full_looks(width: int, height: int) -> list[Look]:
    """All closer looks at a picture."""
    return [look for scale in scales(width, height, FULL_STEP) for look in tiles(width, height, scale)]


def look_where_promising(
    first: Seen,
    width: int,
    height: int,
    confidence: float,
    most: int,
    see: Callable[[Sequence[Look]], list[Seen]],
) -> tuple[list[Seen], bool]:
    """Look closer where the first look missed people, by its evidence, and again inside of what that shows.

    first: the look at the whole picture. most: closer looks that may be taken. see: takes them, or fewer if there is no
    time for more. Returns all that was seen, the first look included, and whether more looks than that would have been
    worth it.
    """
    seen, last, more = [first], [first], False
    for scale in scales(width, height, AUTO_STEP, AUTO_GAIN):
        left = most + 1 - len(seen)
        looks = promising(last, width, height, scale, confidence, left + 1)
        last = see(looks[:left])
        seen += last
        more = more or len(last) < len(looks)
        if not last:
            break
    return seen, more


def promising(seen: Sequence[Seen], width: int, height: int, scale: float, confidence: float, most: int) -> list[Look]:
    """The tiles of a scale that are worth a look, best first, at most `most`. seen: the looks of the scale before.

    A tile is worth it if its candidates let expect WORTH people whom those looks missed. That is a rule of thumb: on
    mosaics of labelled pictures, about half of the small candidates just below the confidence turned out to be missed
    people, fewer of the fainter and of the larger ones, and one in five of the small people who were found had another
    beside them.
    """
    side = round(TILE / scale)
    cell = side / _CELLS
    columns, rows = max(_CELLS, math.ceil(width / cell)), max(_CELLS, math.ceil(height / cell))
    expected = np.zeros((rows, columns))
    for look, boxes in seen:
        size = np.maximum(boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]) * look.scale
        missed = np.where(boxes[:, 4] < confidence, 0.8 * boxes[:, 4] / confidence, 0.2)
        column, row = ((boxes[:, :2] + boxes[:, 2:4]) / 2 / cell).astype(int).T
        np.add.at(expected, (np.minimum(row, rows - 1), np.minimum(column, columns - 1)), missed * np.exp(-size / 64))
    chosen: list[Look] = []
    top, bottom = _inner(rows)
    left, right = _inner(columns)
    while len(chosen) < most:
        sums = np.zeros((rows + 1, columns + 1))
        sums[1:, 1:] = expected.cumsum(0).cumsum(1)
        worth = sums[bottom][:, right] - sums[top][:, right] - sums[bottom][:, left] + sums[top][:, left]
        j, i = divmod(int(worth.argmax()), len(left))
        if worth[j, i] < WORTH:
            break
        expected[top[j] : bottom[j], left[i] : right[i]] = 0
        x, y = (max(0, min(round(n * cell), size - side)) for n, size in ((i, width), (j, height)))
        chosen.append(Look(x, y, min(width, x + side), min(height, y + side), scale))
    return chosen


def _inner(cells: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """For each position of a tile along one axis of the map, the first of its cells that count, and the end of these.

    The cells at the edges of a tile do not count, because people there may be cut, except at the edges of the picture.
    """
    first = np.arange(cells - _CELLS + 1)
    return np.where(first == 0, 0, first + 1), np.where(first == first[-1], cells, first + _CELLS - 1)


def merge(seen: Sequence[Seen], confidence: float, iou: float) -> Boxes:
    """The people that all looks found, each once, best first.

    seen: the look at the whole picture comes first. iou: overlap above which two boxes of one look are one person;
    boxes of two looks are merged at that or at a smaller overlap.
    """
    boxes = np.concatenate([one.boxes for one in seen])
    of = np.repeat(np.arange(len(seen)), [len(one.boxes) for one in seen])
    order = np.argsort(-boxes[:, 4], kind="stable")
    order = order[boxes[order, 4] >= confidence][:MAX_BOXES]
    order = order[(of[order] == 0) | _believable(boxes[order], seen[0])]
    boxes, of = boxes[order], of[order]
    windows = np.array([one.look[:4] for one in seen], float)[of]
    slack = np.array([TOUCH / one.look.scale for one in seen])[of, None]
    # A box is cut where it touches an edge of its window that is not the picture's own edge.
    cut_before = (boxes[:, :2] <= windows[:, :2] + slack) & (windows[:, :2] > seen[0].look[:2])
    cut_after = (boxes[:, 2:4] >= windows[:, 2:] - slack) & (windows[:, 2:] < seen[0].look[2:4])
    cut = (cut_before | cut_after).any(1)

    def same(i: int) -> NDArray[np.intp]:
        """The boxes of other looks that show the person of box i."""
        near = (boxes[:, :2] < boxes[i, 2:4]) & (boxes[:, 2:4] > boxes[i, :2])  # few share any pixel with it
        others = np.flatnonzero(near[:, 0] & near[:, 1] & (of != of[i]))
        theirs, windows_of = boxes[others], windows[others]
        both = np.hstack((np.maximum(windows_of[:, :2], windows[i, :2]), np.minimum(windows_of[:, 2:], windows[i, 2:])))
        agree = _overlap(_clipped(boxes[i, :4], both), _clipped(theirs[:, :4], both)) > min(iou, SAME)
        part = _shared(boxes[i], theirs) > SAME_CUT * np.minimum(_area(boxes[i]), _area(theirs))
        found: NDArray[np.intp] = others[agree | (part & (cut[others] | cut[i]))]
        return found

    left = np.ones(len(boxes), bool)
    people = []
    for i in range(len(boxes)):
        if left[i] and not cut[i]:
            left[same(i)] = False
            people.append(boxes[i])
    left &= cut
    while left.any():  # pieces of people of whom no look has the whole
        pieces = [int(left.argmax())]
        left[pieces[0]] = False
        for piece in pieces:
            more = same(piece)
            more = more[left[more]]
            left[more] = False
            pieces += more.tolist()
        joined = boxes[pieces]
        people.append(np.array([*joined[:, :2].min(0), *joined[:, 2:4].max(0), joined[0, 4]]))
    merged = np.array(people).reshape(-1, 5)
    return merged[np.argsort(-merged[:, 4], kind="stable")]


def _believable(boxes: Boxes, first: Seen) -> NDArray[np.bool_]:
    """Which boxes of closer looks are small in the look at the whole picture, or have a candidate there."""
    size = (boxes[:, 2:4] - boxes[:, :2]).max(1, initial=0) * first.look.scale
    believable: NDArray[np.bool_] = size <= LARGE
    for i in np.flatnonzero(~believable):
        believable[i] = (_overlap(boxes[i], first.boxes) >= SUPPORT).any()
    return believable


Array = NDArray[np.float64]  # (…, 4 or more): boxes


def _clipped(boxes: Array, windows: Array) -> Array:
    """Boxes cut off at the edges of their windows; those outside become empty."""
    corners: Array = np.clip(
        np.stack((boxes[..., :2], boxes[..., 2:4]), -2), windows[:, None, :2], windows[:, None, 2:]
    )
    return corners.reshape(-1, 4)


def _area(boxes: Array) -> Array:
    area: Array = (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
    return area


def _shared(a: Array, b: Array) -> Array:
    """Area of the intersection."""
    sides = np.minimum(a[..., 2:4], b[..., 2:4]) - np.maximum(a[..., :2], b[..., :2])
    area: Array = np.clip(sides, 0, None).prod(-1)
    return area


def _overlap(a: Array, b: Array) -> Array:
    """Intersection over union."""
    shared = _shared(a, b)
    return shared / np.maximum(_area(a) + _area(b) - shared, 1e-9)
