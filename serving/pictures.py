"""Pictures: bytes to upright pixels at the size the network wants, and boxes drawn back onto them."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cache, partial

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFile, ImageFont
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from serving.contract import Limits
from serving.looks import Look

Pixels = NDArray[np.uint8]  # (height, width, 3), RGB

# The formats that are opened at all, by their first bytes; each further one is a parser to attack. Image.open is not
# used, because its limit of pixels holds for a whole process, which may be a program that imports this.
FORMATS: dict[bytes, type[ImageFile.ImageFile]] = {
    b"\xff\xd8\xff": JpegImageFile,
    b"\x89PNG\r\n\x1a\n": PngImageFile,
    b"GIF8": GifImageFile,
    b"RIFF": WebPImageFile,
}
LONGEST_SIDE = 640  # pixels of the letterboxed picture's longer side, as YOLOv5 was trained
PADDING = 114  # YOLOv5's letterbox grey
GREEN = (0, 200, 90)  # of boxes that are drawn
SMALLEST_LABEL = 10  # pixels, of letters that can be read

# The eight EXIF orientations as (mirror left-right first?, quarter turns counter-clockwise then).
# EXIF 2.3, tag 0x0112.
_ORIENTATIONS = {
    2: (True, 0),
    3: (False, 2),
    4: (True, 2),
    5: (True, 1),
    6: (False, 3),
    7: (True, 3),
    8: (False, 1),
}
_EXIF_ORIENTATION = 0x0112


class PictureError(ValueError):
    """Bytes that cannot be counted; the message says why and what would do."""


@dataclass(frozen=True)
class Letterbox:
    """A picture ready for the network, and the way back to its own pixels.

    pixels: (h, w, 3), h and w multiples of the stride, the longer one LONGEST_SIDE rounded up to it.
    width, height: the upright picture's own size. scale: letterboxed over own pixels, per axis (x, y).
    left, top: padding in letterboxed pixels. own: returns the upright picture's own pixels; may raise PictureError.
    milliseconds: what decoding and resizing took.
    """

    pixels: Pixels
    width: int
    height: int
    scale: tuple[float, float]
    left: int
    top: int
    own: Callable[[], Pixels] | None = field(default=None, compare=False, repr=False)
    milliseconds: dict[str, float] = field(default_factory=dict, compare=False)


def letterbox(
    data: bytes | memoryview, stride: int = 32, max_pixels: int = Limits.max_pixels, keep: bool = False
) -> Letterbox:
    """Decode a picture, turn it upright and fit it into a rectangle as YOLOv5 does.

    A JPEG is decoded at 1/2 or 1/4 of its size where that still has all the pixels the network sees. keep: if the own
    pixels were decoded, keep them in memory for closer looks, which decode the picture again otherwise.
    Raises PictureError.
    """
    began = time.perf_counter()
    opened = _open(data, max_pixels)
    turned = opened.orientation in (5, 6, 7, 8)
    width, height = (opened.height, opened.width) if turned else (opened.width, opened.height)
    ratio = LONGEST_SIDE / max(width, height)
    inner_w, inner_h = max(1, round(width * ratio)), max(1, round(height * ratio))
    stored = (inner_h, inner_w) if turned else (inner_w, inner_h)
    small = opened.decode(stored)  # or larger
    decoded = time.perf_counter()
    box = _padded(_upright(_resize(small, stored), opened.orientation), width, height, stride)
    spent = {"decode": (decoded - began) * 1e3, "resize": (time.perf_counter() - decoded) * 1e3}
    if keep and small.shape[:2] == (opened.height, opened.width):
        own = partial(_upright, small, opened.orientation)
    else:
        own = partial(upright, data, max_pixels)
    return replace(box, own=own, milliseconds=spent)


def closer_look(own: Pixels, look: Look, stride: int = 32) -> Letterbox:
    """A part of a picture as `letterbox` makes the whole: own is the picture, `width` and `height` are the part's."""
    part = np.ascontiguousarray(own[look.top : look.bottom, look.left : look.right])
    height, width = part.shape[:2]
    size = (max(1, round(width * look.scale)), max(1, round(height * look.scale)))
    return _padded(_resize(part, size), width, height, stride)


def _padded(pixels: Pixels, width: int, height: int, stride: int) -> Letterbox:
    """A picture, or a part of one, of width × height own pixels, resized to these pixels, in the middle of its box."""
    inner_h, inner_w = pixels.shape[:2]
    outer_w, outer_h = (math.ceil(side / stride) * stride for side in (inner_w, inner_h))
    left, top = (outer_w - inner_w) // 2, (outer_h - inner_h) // 2
    if (outer_w, outer_h) != (inner_w, inner_h):
        canvas = np.full((outer_h, outer_w, 3), PADDING, np.uint8)
        canvas[top : top + inner_h, left : left + inner_w] = pixels
        pixels = canvas
    return Letterbox(np.ascontiguousarray(pixels), width, height, (inner_w / width, inner_h / height), left, top)


def upright(data: bytes | memoryview, max_pixels: int = Limits.max_pixels) -> Pixels:
    """All of a picture's pixels as a viewer shows them. Raises PictureError."""
    opened = _open(data, max_pixels)
    return _upright(opened.decode(None), opened.orientation)


def annotate(
    data: bytes | memoryview,
    boxes: Iterable[tuple[float, float, float, float]],
    labels: Iterable[str],
    region: Iterable[tuple[float, float]] | None = None,
    max_pixels: int = Limits.max_pixels,
) -> bytes:
    """The upright picture as JPEG with boxes (upright pixels), their labels and the region drawn on it.

    Lines and labels are as large as the picture wants and as small as the box needs. A box that is too narrow for a
    label that can be read has none.
    """
    picture = Image.fromarray(upright(data, max_pixels))
    draw = ImageDraw.Draw(picture)
    thick, large = max(2, round(max(picture.size) / 400)), max(SMALLEST_LABEL, round(max(picture.size) / 55))
    if region is not None:
        corners = [(x * picture.width, y * picture.height) for x, y in region]
        draw.line([*corners, corners[0]], fill=(255, 200, 0), width=thick, joint="curve")
    labelled = []
    for box, label in zip(boxes, labels, strict=True):
        width, height = box[2] - box[0], box[3] - box[1]
        line = max(2, min(thick, round(min(width, height) / 25)))
        out = line // 2  # so that the middle of the line is the box
        draw.rectangle((box[0] - out, box[1] - out, box[2] + out, box[3] + out), outline=GREEN, width=line)
        size = min(large, int(0.8 * width / max(1, len(label))))
        if size >= SMALLEST_LABEL:
            labelled.append((box, label, line, size))
    for box, label, line, size in labelled:  # after all boxes, whose lines would cross them
        font = _font(size)
        left, top, right, bottom = draw.textbbox((0, 0), label, font=font, anchor="lt")
        width, height = right - left + 2 * line, bottom - top + 2 * line
        # Above the box, but inside the picture.
        x, y = max(0, min(box[0], picture.width - width)), max(0, box[1] - height)
        draw.rectangle((x, y, x + width, y + height), fill=GREEN)
        draw.text((x + line, y + line), label, fill=(0, 0, 0), font=font, anchor="lt")
    return bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(picture), quality=90))


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


@dataclass(frozen=True)
class _Opened:
    """A picture whose header was read and accepted; width and height are as stored, before orientation."""

    data: bytes | memoryview
    image: Image.Image | None  # None: simplejpeg decodes it
    width: int
    height: int
    orientation: int

    def decode(self, at_least: tuple[int, int] | None) -> Pixels:
        """RGB pixels as stored; with at_least (width, height), perhaps smaller but not below it."""
        if self.image is None:
            width, height = at_least or (self.width, self.height)
            # Below 1/4 counts change (README.md, Why it is so); the decoder may choose smaller only down to this.
            width, height = max(width, self.width // 4), max(height, self.height // 4)
            try:
                decoded: Pixels = simplejpeg.decode_jpeg(self.data, "RGB", min_width=width, min_height=height)
                return decoded
            except ValueError:  # strict about every warning; Pillow knows which of them matter
                return _pillow_pixels(_open_with_pillow(self.data, self.width * self.height))
        return _pillow_pixels(self.image)


def _open(data: bytes | memoryview, max_pixels: int) -> _Opened:
    if not len(data):
        raise PictureError("the picture is empty; send the bytes of a JPEG, PNG, WebP or GIF file")
    head = bytes(data[: 1 << 16])
    if head[:2] == b"\xff\xd8":
        try:
            height, width, space, _ = simplejpeg.decode_jpeg_header(data)
        except ValueError:
            space = "unknown"  # Pillow decides
        if space in ("YCbCr", "Gray", "RGB"):
            _check_size(width, height, max_pixels)
            orientation = 1
            if b"Exif\0\0" in head:
                orientation = _orientation(_open_with_pillow(data, max_pixels))
            return _Opened(data, None, width, height, orientation)
    image = _open_with_pillow(data, max_pixels)
    # Before the EXIF is read: that decodes a PNG too, and a picture that could not be decoded raises only once.
    _load(image)
    return _Opened(data, image, image.width, image.height, _orientation(image))


def _open_with_pillow(data: bytes | memoryview, max_pixels: int) -> Image.Image:
    try:
        image = next(kind for magic, kind in FORMATS.items() if bytes(data[: len(magic)]) == magic)(io.BytesIO(data))
    except Image.DecompressionBombError as error:  # Pillow applies its limit to WebP before anybody knows the size
        raise PictureError(f"the picture is larger than PIL.Image.MAX_IMAGE_PIXELS allows here: {error}") from None
    except Exception:
        raise PictureError(
            "this is not a picture that can be read; send the bytes of a JPEG, PNG, WebP or GIF file"
        ) from None
    _check_size(image.width, image.height, max_pixels)
    return image


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise PictureError(
            f"the picture has {width}×{height} pixels; at most {max_pixels / 1e6:g} megapixels are accepted: "
            "send it smaller, or raise HEADCOUNT_MAX_PIXELS where the server runs"
        )


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # broken EXIF: viewers show the picture as stored
        return 1


def _load(image: Image.Image) -> None:
    try:
        image.load()
    except Exception as error:
        raise PictureError(f"the picture is damaged or cut short ({error}); send it again") from None


def _pillow_pixels(image: Image.Image) -> Pixels:
    _load(image)
    try:
        if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion clips instead of scaling
            values = np.asarray(image).astype(np.uint32)
            image = Image.fromarray((np.clip(values, 0, 65535) >> 8).astype(np.uint8))
        if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
            # What lies under full transparency is arbitrary; viewers show the page, which is white.
            # paste, not alpha_composite: the same pixels in half the time, and two copies fewer of a large picture.
            image, above = Image.new("RGB", image.size, "white"), image.convert("RGBA")
            image.paste(above, mask=above.getchannel("A"))
        return np.asarray(image.convert("RGB"))
    except Exception as error:
        raise PictureError(f"the picture cannot be converted to RGB ({error}); send it as JPEG or PNG") from None


def _upright(pixels: Pixels, orientation: int) -> Pixels:
    mirror, turns = _ORIENTATIONS.get(orientation, (False, 0))
    if mirror:
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(np.rot90(pixels, turns)) if mirror or turns else pixels


def _resize(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    height, width = pixels.shape[:2]
    if (width, height) == size:
        return pixels
    # Linear interpolation sees four pixels only: beyond 2:1 it would skip some.
    shrinks = max(width / size[0], height / size[1])
    how = cv2.INTER_AREA if shrinks > 2 else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(pixels, size, interpolation=how), dtype=np.uint8)
