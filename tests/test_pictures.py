"""Pictures of every kind a person may send count as the plain one does."""

from __future__ import annotations

import contextlib
import io
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from serving.contract import Limits, Parameters
from serving.detector import Detector, choose_people
from serving.pictures import PictureError, annotate, letterbox, upright


@pytest.fixture(scope="module")
def detector(checkpoint: Path) -> Detector:
    return Detector(checkpoint)


def encode(picture: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def stored(picture: Image.Image, orientation: int) -> Image.Image:
    """The picture as a camera held that way stores it."""
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Image.Transpose; FLIP_TOP_BOTTOM is 1, ROTATE_180 3
    return picture.transpose(Image.Transpose(undo[orientation])) if orientation in undo else picture


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags.tobytes()


def sixteen_bit_grey(picture: Image.Image) -> bytes:
    return encode(Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257), "PNG")


def transparent(picture: Image.Image) -> bytes:
    """The people stay; a strip of the sky is cut out and holds garbage underneath."""
    alpha = Image.new("L", picture.size, 255)
    alpha.paste(0, (0, 0, picture.width, 40))
    return encode(Image.merge("RGBA", (*picture.split(), alpha)), "PNG")


KINDS: dict[str, Any] = {
    "PNG": lambda p: encode(p, "PNG", compress_level=1),
    "WebP": lambda p: encode(p, "WEBP", quality=90),
    "GIF": lambda p: encode(p, "GIF", save_all=True, append_images=[Image.new("RGB", p.size)]),
    "palette": lambda p: encode(p.quantize(256), "PNG"),
    "CMYK": lambda p: encode(p.convert("CMYK"), "JPEG", quality=95),
    "grey JPEG": lambda p: encode(p.convert("L"), "JPEG", quality=95),
    "16-bit grey": sixteen_bit_grey,
    "transparent": transparent,
    "progressive": lambda p: encode(p, "JPEG", progressive=True, quality=95),
    "12 megapixels": lambda p: encode(p.resize((3024, 4032)), "JPEG", quality=90),
    **{f"EXIF {o}": lambda p, o=o: encode(stored(p, o), "JPEG", quality=95, exif=exif(o)) for o in range(1, 9)},
    "EXIF 6 PNG": lambda p: encode(stored(p, 6), "PNG", exif=exif(6), compress_level=1),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_counts_four_on_the_bus(detector: Detector, data: Path, kind: str) -> None:
    picture = Image.open(data / "people" / "bus.jpg").convert("RGB")
    box = detector.prepare(KINDS[kind](picture), Limits())
    count = detector.count([box], [Parameters()])[0]
    assert len(count.people) == 4
    scale = count.height / 1080
    assert (count.width, count.height) == (round(810 * scale), round(1080 * scale))
    plain = detector.count([detector.prepare((data / "people" / "bus.jpg").read_bytes(), Limits())], [Parameters()])[0]
    # Grey and palette pictures are found a little elsewhere.
    np.testing.assert_allclose(
        sorted(p.box[0] / scale for p in count.people), sorted(p.box[0] for p in plain.people), atol=25
    )


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_what_viewers_show(orientation: int) -> None:
    rng = np.random.default_rng(orientation)
    shown = Image.fromarray(rng.integers(0, 255, (64, 96, 3), np.uint8)).resize((640, 416))
    data = encode(stored(shown, orientation), "PNG", exif=exif(orientation))
    assert ImageOps.exif_transpose(Image.open(io.BytesIO(data))).tobytes() == shown.tobytes()
    np.testing.assert_array_equal(letterbox(data).pixels, np.asarray(shown))


def test_letterbox_pads_the_middle_and_knows_the_way_back() -> None:
    box = letterbox(encode(Image.new("RGB", (1280, 720)), "PNG"))
    assert box.pixels.shape == (384, 640, 3)
    assert (box.left, box.top, box.scale) == (0, 12, (0.5, 0.5))
    assert (box.pixels[:12] == 114).all()
    assert (box.pixels[12:-12] == 0).all()


@pytest.mark.parametrize("size", [(1, 1), (100, 20000), (20000, 100), (1, 5000), (33, 31)])
def test_extreme_sizes(detector: Detector, size: tuple[int, int]) -> None:
    box = detector.prepare(encode(Image.new("RGB", size, "red"), "PNG"), Limits())
    assert detector.count([box], [Parameters()])[0].people == []
    assert (box.width, box.height) == size


def test_bombs_are_refused_before_they_are_decoded() -> None:
    bomb = encode(Image.new("1", (30000, 30000)), "PNG")
    assert len(bomb) < 200_000
    with pytest.raises(PictureError, match=r"30000×30000 pixels; at most 50 megapixels.*HEADCOUNT_MAX_PIXELS"):
        letterbox(bomb)
    jpeg = encode(Image.new("L", (8000, 8000)), "JPEG")
    with pytest.raises(PictureError, match="8000×8000"):
        letterbox(jpeg)
    assert letterbox(jpeg, max_pixels=64_000_000).width == 8000


def test_pillow_s_limit_is_the_host_program_s(tmp_path: Path) -> None:
    """A program that counts in its own process keeps its limit. Where Pillow applies it, the error names it."""
    for kind in ("JPEG", "PNG", "WEBP", "GIF"):
        Image.new("RGB", (300, 300)).save(tmp_path / f"picture.{kind}")
    program = """
import sys, warnings
from pathlib import Path
from PIL import Image
warnings.simplefilter("error")
default = Image.MAX_IMAGE_PIXELS
assert default > 0
import headcount, serving.pictures
assert Image.MAX_IMAGE_PIXELS == default
Image.MAX_IMAGE_PIXELS = 1000
for kind in ("JPEG", "PNG", "GIF"):
    picture = Path(sys.argv[1], f"picture.{kind}").read_bytes()
    assert serving.pictures.letterbox(picture).width == 300
    assert serving.pictures.upright(picture).shape == (300, 300, 3)
assert Image.MAX_IMAGE_PIXELS == 1000
try:
    serving.pictures.letterbox(Path(sys.argv[1], "picture.WEBP").read_bytes())
except serving.pictures.PictureError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program, tmp_path], check=True, capture_output=True, text=True)
    assert "larger than PIL.Image.MAX_IMAGE_PIXELS allows here" in done.stdout


@pytest.mark.parametrize("data", [b"x", b"\xff\xd8\xff", b"GIF89a", b"\x89PNG\r\n\x1a\n", b"BM" + bytes(60)])
def test_what_is_no_picture_says_so(data: bytes) -> None:
    with pytest.raises(PictureError, match=r"not a picture|damaged"):
        letterbox(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF"])
def test_cut_short(kind: str) -> None:
    rng = np.random.default_rng(1)
    whole = encode(Image.fromarray(rng.integers(0, 255, (200, 300, 3), np.uint8)), kind)
    with pytest.raises(PictureError, match=r"damaged or cut short|not a picture"):
        letterbox(whole[: len(whole) // 2])


def test_a_png_that_cannot_be_inflated_is_damaged() -> None:
    """Pillow decodes a PNG when its EXIF is asked for, and raises only once."""
    whole = encode(Image.new("RGB", (640, 640)), "PNG")
    with pytest.raises(PictureError, match="damaged"):
        letterbox(whole[: whole.index(b"IDAT")] + b"IDAT" + bytes(100))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("broken", [b"Exif\0\0no TIFF", exif(6)[:12] + bytes(9), b"Exif\0\0II*\0\xff\xff\xff\xff"])
def test_a_picture_with_broken_exif_is_read_as_stored(broken: bytes) -> None:
    data = encode(Image.new("RGB", (64, 32), "white"), "JPEG", exif=broken)
    assert upright(data).shape == (32, 64, 3)


def test_ten_thousand_mutated_pictures_are_decoded_or_refused() -> None:
    """Any error but PictureError fails."""
    rng = random.Random(1)
    picture = Image.fromarray(np.random.default_rng(2).integers(0, 255, (40, 60, 3), np.uint8))
    originals = {kind: encode(picture, kind) for kind in ("JPEG", "PNG", "WEBP", "GIF")}
    decoded = Counter[str]()
    for i in range(10_000):
        kind = list(originals)[i % 4]
        data = bytearray(originals[kind])
        for _ in range(rng.choice((1, 2, 4, 30))):
            data[rng.randrange(len(data))] = rng.randrange(256)
        if rng.random() < 0.1:
            del data[rng.randrange(1, len(data)) :]
        with contextlib.suppress(PictureError):
            assert max(letterbox(bytes(data)).pixels.shape) == 640
            decoded[kind] += 1
    assert set(decoded) == set(originals), "some of each kind could be decoded"
    assert sum(decoded.values()) < 9000, "and some of them not"


@settings(max_examples=100)
@given(
    st.integers(40, 1500), st.integers(40, 1500), st.tuples(*[st.floats(0, 1)] * 4), st.integers(1, 8),
)  # fmt: skip
def test_a_box_comes_back_to_where_it_was(width: int, height: int, shares: tuple[float, ...], orientation: int) -> None:
    """A white rectangle in the network's input is within a pixel of the place where it was painted."""
    assume(1 / 8 < width / height < 8)
    side = max(width, height)
    least = max(4, side / 40)
    w, h = least + shares[2] * (width - least), least + shares[3] * (height - least)
    left, top = round(shares[0] * (width - w)), round(shares[1] * (height - h))
    right, bottom = min(width, round(left + w)), min(height, round(top + h))
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[top:bottom, left:right] = 255
    data = encode(stored(Image.fromarray(pixels), orientation), "PNG", exif=exif(orientation), compress_level=1)
    box = letterbox(data)
    assert (box.width, box.height) == (width, height)
    inside = box.pixels[box.top : box.pixels.shape[0] - box.top, box.left : box.pixels.shape[1] - box.left]
    ys, xs = np.nonzero(inside[..., 0] > 127)
    found = [xs.min() + box.left, ys.min() + box.top, xs.max() + 1 + box.left, ys.max() + 1 + box.top]
    candidate = np.array([[found[0], found[1], found[2] - found[0], found[3] - found[1], 0.9]], float)
    (person,) = choose_people(candidate, box, Parameters())
    np.testing.assert_allclose(person.box, (left, top, right, bottom), atol=max(1, side / 640))


def test_annotated_picture_is_upright_and_drawn_on(data: Path) -> None:
    bus = Image.open(data / "people" / "bus.jpg").convert("RGB")
    turned = encode(stored(bus, 6), "JPEG", exif=exif(6), quality=95)
    drawn = Image.open(io.BytesIO(annotate(turned, [(100, 200, 300, 500)], ["person 0.90"], [(0, 0), (1, 0), (1, 1)])))
    assert drawn.size == bus.size
    assert drawn.format == "JPEG"
    pixel: Any = drawn.getpixel((100, 350))
    red, green, blue = pixel
    assert green > 150 > max(red, blue) - 40
