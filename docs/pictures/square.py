"""Draws the crowd on a square that the README shows: `python docs/pictures/square.py square.jpg`.

A person is a skeleton in metres, seen by a camera above the square. Limbs are surfaces of revolution, shaded by their
normals, because a network that learned from photographs overlooks flat figures. A seed decides the rest.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

Floats = NDArray[np.float64]
Colour = Sequence[float] | Floats  # red, green and blue up to 255
Profile = Sequence[tuple[float, float]]  # places from 0 to 1 along a limb, and its radii there

PEOPLE = 100
WIDTH, HEIGHT = 1920, 1280  # pixels
HORIZON = 250  # the row in which the ground would end
CAMERA = 5.2  # metres above the ground
FOCAL = 1500  # pixels
HOUSES = 75  # metres away
SUN = np.array([-0.55, 0.6, 0.58])  # its direction: from the left, from above, and from behind the camera
SKIN = [(236, 196, 168), (222, 172, 138), (198, 146, 110), (158, 106, 76), (110, 72, 52), (84, 56, 42)]
HAIR = [(28, 22, 20), (54, 38, 28), (92, 62, 40), (168, 128, 76), (140, 136, 132), (110, 52, 30)]
TOPS = [(196, 60, 52), (42, 78, 140), (232, 228, 220), (36, 38, 44), (84, 128, 84), (222, 178, 70), (120, 120, 128),
        (70, 44, 84), (210, 120, 150), (60, 130, 150), (140, 96, 64), (180, 190, 206)]  # fmt: skip
BOTTOMS = [(48, 62, 92), (34, 36, 44), (88, 98, 120), (120, 104, 84), (64, 60, 58), (160, 148, 128)]
SHOES = [(30, 28, 28), (210, 208, 204), (92, 60, 40)]
WALLS = [(206, 178, 140), (190, 160, 150), (214, 204, 184), (178, 150, 118), (196, 190, 170)]


class Limb(NamedTuple):
    """start, end: to the side, up, and ahead, in metres. flat: its depth is this part of its width."""

    start: Floats
    end: Floats
    profile: Profile
    colour: Colour
    flat: float = 1


@dataclass(frozen=True)
class Figure:
    """A person on the ground. x, depth: in metres from the camera. legs, body: in metres, the face ahead."""

    x: float
    depth: float
    legs: list[Limb]
    body: list[Limb]


def figure(rng: np.random.Generator, x: float, depth: float) -> Figure:
    """Somebody of a height, clothes and a step by chance, who looks in any direction."""

    def chance(probability: float) -> bool:
        return bool(rng.random() < probability)

    def of(colours: Sequence[Colour]) -> Floats:
        return np.clip(np.array(colours[int(rng.integers(len(colours)))]) + rng.normal(0, 6), 0, 255)

    woman, walks, sleeves, pack = chance(0.5), chance(0.75), chance(0.6), chance(0.25)
    skirt = woman and chance(0.35)
    size = rng.normal(1.65 if woman else 1.78, 0.06) / 1.75
    heading, phase = rng.uniform(-np.pi, np.pi), rng.uniform(0, 2 * np.pi)
    skin, hair, top, bottom, shoes, bag = of(SKIN), of(HAIR), of(TOPS), of(BOTTOMS), of(SHOES), of(TOPS)
    swing = (0.22 if skirt else 0.42) * np.sin(phase) if walks else 0.05
    turn = np.array([[np.cos(heading), 0, np.sin(heading)], [0, 1, 0], [-np.sin(heading), 0, np.cos(heading)]])

    def at(side: float, up: float, ahead: float) -> Floats:
        return np.array([side, up, ahead])

    def limb(start: Floats, end: Floats, profile: Profile, colour: Colour, flat: float = 1) -> Limb:
        wide = np.hypot(np.cos(heading), np.sin(heading) * flat) * size
        return Limb(turn @ start * size, turn @ end * size, [(t, radius * wide) for t, radius in profile], colour, flat)

    legs, body = [], []
    for side in (-1, 1):
        angle = -side * swing
        hip = at(side * (0.095 if woman else 0.085), 0.93, 0)
        knee = hip + 0.44 * at(0, -np.cos(angle + 0.1), np.sin(angle + 0.1))
        bend = angle - (0.55 if walks and angle < -0.1 else 0.04)
        ankle = knee + 0.43 * at(0, -np.cos(bend), np.sin(bend))
        wide, cloth = (1, skin) if skirt else (1.18, bottom)
        legs += [
            limb(hip, knee, [(0, 0.088 * wide), (0.5, 0.078 * wide), (1, 0.056 * wide)], cloth),
            limb(knee, ankle, [(0, 0.056 * wide), (0.3, 0.058 * wide), (1, 0.038 if skirt else 0.057)], cloth),
            limb(ankle - at(0, 0.02, 0.05), ankle + at(side * 0.03, -0.045, 0.17), [(0, 0.04), (1, 0.036)], shoes),
        ]
        arm, slim = 0.05 - angle * 0.9, 0.9 if woman else 1.05
        fore = arm + (0.5 if walks else 0.25)
        shoulder = at(side * (0.165 if woman else 0.195), 1.385, 0)
        elbow = shoulder + 0.29 * at(side * 0.18, -np.cos(arm), np.sin(arm))
        wrist = elbow + 0.25 * at(side * 0.02, -np.cos(fore), np.sin(fore))
        body += [
            limb(shoulder, elbow, [(0, 0.056 * slim), (1, 0.042 * slim)], top),
            limb(elbow, wrist, [(0, 0.042 * slim), (1, 0.03 * slim)], top if sleeves else skin),
            limb(wrist, wrist * 1.42 - elbow * 0.42, [(0, 0.028), (0.5, 0.04), (1, 0.022)], skin),
            limb(at(side * 0.035, 1.645, 0.105), at(side * 0.035, 1.65, 0.105), [(0, 0.011)], (30, 24, 22)),  # an eye
        ]
    waist = (0.19, 0.17, 0.14, 0.17) if woman else (0.22, 0.205, 0.175, 0.175)
    trunk = [(0, 0.055), (0.05, 0.145), *zip((0.12, 0.35, 0.6, 0.9), waist, strict=True), (1, 0.165)]
    body.append(limb(at(0, 1.47, 0), at(0, 0.86, 0), trunk, top, 0.66))
    if skirt:
        body.append(limb(at(0, 1.0, 0), at(0, 0.5, 0), [(0, 0.15), (0.4, 0.2), (1, 0.26)], bottom, 0.85))
    else:
        body.append(limb(at(0, 0.96, 0), at(0, 0.8, 0), [(0, 0.165), (0.6, 0.18), (1, 0.14)], bottom, 0.7))
    if pack:
        body.append(limb(at(0, 1.42, -0.17), at(0, 1.0, -0.17), [(0, 0.1), (0.1, 0.15), (0.9, 0.16), (1, 0.12)], bag))
    head = [(0, 0.045), (0.12, 0.07), (0.4, 0.09), (0.7, 0.092), (0.9, 0.06), (1, 0.03)]
    long_hair = [(0, 0.05), (0.2, 0.09), (0.55, 0.103), (0.85, 0.075), (1, 0.03)]
    body += [
        limb(at(0, 1.42, 0), at(0, 1.56, 0.01), [(0, 0.06), (1, 0.05)], skin),
        limb(at(0, 1.515, 0.025), at(0, 1.745, 0.015), head, skin),
        limb(at(0, 1.36 if woman else 1.56, -0.035), at(0, 1.765, -0.025), long_hair, hair),
        limb(at(0, 1.70, 0.03), at(0, 1.775, 0.02), [(0, 0.092), (0.6, 0.085), (1, 0.04)], hair),
        limb(at(-0.02, 1.575, 0.1), at(0.02, 1.575, 0.1), [(0, 0.009)], (150, 70, 66)),  # the mouth
    ]
    return Figure(x, depth, legs, body)


def crowd(rng: np.random.Generator, count: int) -> list[Figure]:
    """People who hide little of each other, the furthest first."""
    found: list[Figure] = []
    taken: list[Floats] = []
    while len(found) < count:
        depth = rng.uniform(16, 48) if rng.random() < 0.45 else 1 / rng.uniform(1 / 46, 1 / 8.6)
        x = rng.uniform(-0.62, 0.62) * depth
        box = project(np.array([[x - 0.3, 1.8, depth], [x + 0.3, 0.0, depth]])).ravel()
        if (
            box[0] >= 10
            and box[2] <= WIDTH - 10
            and box[3] <= HEIGHT - 12
            and all(hidden(box, o) < 0.22 for o in taken)
        ):
            taken.append(box)
            found.append(figure(rng, x, depth))
    return sorted(found, key=lambda one: -one.depth)


def hidden(one: Floats, other: Floats) -> float:
    """The part of the smaller box that the other one covers."""
    sides = np.clip(np.minimum(one[2:], other[2:]) - np.maximum(one[:2], other[:2]), 0, None)
    return float(sides.prod() / min((one[2:] - one[:2]).prod(), (other[2:] - other[:2]).prod()))


def project(points: Floats) -> Floats:
    """Columns and rows of points on the square, whose last axis has x, the height and the depth in metres."""
    scale = FOCAL / points[..., 2]
    return np.stack((WIDTH / 2 + points[..., 0] * scale, HORIZON + (CAMERA - points[..., 1]) * scale), -1)


def draw(canvas: Floats, one: Figure, rng: np.random.Generator) -> None:
    """Draws a figure over a picture of rows × columns × 3."""
    for group in (one.legs, one.body):  # clothes are over the legs
        for limb in sorted(group, key=lambda limb: float(limb.start[2] + limb.end[2])):
            ends = np.stack((limb.start, limb.end))
            draw_limb(
                canvas, project(np.array([one.x, 0, one.depth]) + ends * (1, 1, -1)), limb, FOCAL / one.depth, rng
            )


def draw_limb(canvas: Floats, ends: Floats, limb: Limb, scale: float, rng: np.random.Generator) -> None:
    """Draws a limb between two places in pixels. scale: pixels a metre."""
    where, radii = np.array(limb.profile).T
    radii = radii * scale
    length = max(float(np.hypot(*(ends[1] - ends[0]))), 1e-6)
    axis = (ends[1] - ends[0]) / length
    low = np.maximum(np.floor(ends.min(0) - radii.max() - 2).astype(int), 0)
    high = np.minimum(np.ceil(ends.max(0) + radii.max() + 2).astype(int) + 1, (WIDTH, HEIGHT))
    rows, columns = np.mgrid[low[1] : high[1], low[0] : high[0]]
    offset = np.stack((columns, rows), -1) - ends[0]
    along, across = offset @ axis, offset @ np.array([-axis[1], axis[0]])
    inner = np.clip(along, 0, length)
    radius = np.maximum(np.interp(inner / length, where, radii), 0.5)
    beyond = (along - inner) * np.maximum(1, radius / (0.05 * scale))  # ends are round, and wide ones flat, as a hem is
    cover = np.clip(radius - np.hypot(across, beyond) + 0.5, 0, 1)[..., None]
    u, v = np.clip(across / radius, -1, 1), np.clip(beyond / radius, -1, 1)
    ahead = np.sqrt(np.clip(1 - u**2 - v**2, 0, 1))
    normals = np.stack((axis[0] * v - axis[1] * u, -axis[0] * u - axis[1] * v, ahead), -1)
    light = np.clip(normals @ (SUN / np.linalg.norm(SUN)), 0, 1)
    folds = 0.07 * noise(rng, high[0] - low[0], high[1] - low[1], max(2, 0.05 * scale))
    tint = np.where(light[..., None] > 0.4, (1.03, 1.0, 0.95), (0.93, 0.97, 1.05))  # the sky colours the shade
    part = canvas[low[1] : high[1], low[0] : high[0]]
    part += (np.clip(np.asarray(limb.colour) * (0.42 + 0.72 * light + folds)[..., None] * tint, 0, 255) - part) * cover


def noise(rng: np.random.Generator, width: int, height: int, size: float) -> Floats:
    """Smooth noise around 0 with blotches of a size in pixels."""
    shape = max(2, round(height / size) + 1), max(2, round(width / size) + 1)
    small = Image.fromarray(rng.normal(0, 1, shape).astype(np.float32))
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC), float)


def shadows(people: Sequence[Figure]) -> Floats:
    """How much the ground is in shadow, from 0 to 1: limbs are put down where the sun's rays through them end."""
    mask = Image.new("L", (WIDTH, HEIGHT))
    pen = ImageDraw.Draw(mask)
    for one in people:
        for limb in one.legs + one.body:
            ends = np.stack((limb.start, limb.end))
            fall = np.maximum(ends[:, 1:2], 0) / SUN[1] * np.array([-SUN[0], 0, SUN[2]])
            places = project(np.array([one.x, 0, one.depth]) + ends * (1, 0, -1) + fall)
            radius = max(radius for _, radius in limb.profile) * FOCAL / one.depth
            pen.line([tuple(place) for place in places], 255, max(1, round(radius * 1.6)))
            for x, y in places:
                pen.ellipse((x - radius * 0.8, y - radius * 0.5, x + radius * 0.8, y + radius * 0.5), 255)
    return np.asarray(mask.filter(ImageFilter.GaussianBlur(3)), float) / 255


def empty_square(rng: np.random.Generator) -> Floats:
    """The sky, houses, and paving."""
    rows, columns = np.mgrid[0:HEIGHT, 0:WIDTH].astype(float)
    sky = np.array([150, 184, 222]) + (rows / HORIZON)[..., None] * np.array([50, 34, 14])
    depth = FOCAL * CAMERA / np.maximum(rows - HORIZON, 1)
    x = (columns - WIDTH / 2) * depth / FOCAL
    slab = np.floor(x / 1.2) * 13.7 + np.floor(depth / 1.2) * 7.3
    tone = np.sin(slab * 12.9898) * 43758.5453 % 1 - 0.5  # of each slab another one
    seam = (np.minimum(x % 1.2, depth % 1.2) < 0.05) * np.clip(1 - depth / 35, 0, 1)
    stone = 172 + 14 * tone * np.clip(1 - depth / 50, 0, 1) - 26 * seam
    stone += 5 * noise(rng, WIDTH, HEIGHT, 90) + 3 * noise(rng, WIDTH, HEIGHT, 6)
    canvas = np.where((rows > HORIZON)[..., None], stone[..., None] * np.array([1.02, 0.98, 0.91]), sky)
    picture = Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(picture)
    left, foot, floors = -30, HORIZON + round(FOCAL * CAMERA / HOUSES), 4
    while left < WIDTH:
        width, roof = int(rng.integers(150, 260)), int(rng.integers(10, 90))
        red, green, blue = WALLS[rng.integers(len(WALLS))]
        pen.rectangle((left, roof, left + width, foot), (red, green, blue))
        pen.rectangle((left, roof, left + width, roof + 8), (red * 3 // 4, green * 3 // 4, blue * 3 // 4))
        for floor in range(floors):
            for bay in range(width // 42):
                x0 = left + (bay + 0.5) * width / (width // 42) - 9
                y0 = roof + 24 + floor * (foot - roof - 30) / floors
                frame = (red + 20, green + 20, blue + 20)
                pen.rectangle((x0 - 2, y0 - 2, x0 + 20, y0 + 40), frame)
                pen.rectangle((x0, y0, x0 + 18, y0 + 38), (64, 74, 88) if floor < floors - 1 else (58, 50, 46))
                pen.line((x0 + 9, y0, x0 + 9, y0 + 38), frame)
        left += width
    return np.array(picture.filter(ImageFilter.GaussianBlur(1)), float)


def square(people: int = PEOPLE, seed: int = 4) -> Image.Image:
    """The picture, with the blur and the grain of a photograph."""
    rng = np.random.default_rng(seed)
    canvas = empty_square(rng)
    figures = crowd(rng, people)
    canvas *= 1 - shadows(figures)[..., None] * np.array([0.42, 0.40, 0.37])
    for one in figures:
        draw(canvas, one, rng)
    sharp = Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))
    grainy = np.array(sharp.filter(ImageFilter.GaussianBlur(0.7)), float) + rng.normal(0, 4, (HEIGHT, WIDTH, 1))
    return Image.fromarray(np.clip(grainy, 0, 255).astype(np.uint8))


if __name__ == "__main__":
    square().save(Path(sys.argv[1]), quality=92)
