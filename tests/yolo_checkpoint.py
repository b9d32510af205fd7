"""Small YOLOv5 checkpoints with random weights, pickled under the names that YOLOv5 itself uses."""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from helpers import encode
from PIL import Image
from torch import nn


class _Part(nn.Module):
    def __init__(self, f: int | list[int] = -1, **parts: Any) -> None:
        super().__init__()
        self.f = f
        for name, part in parts.items():
            setattr(self, name, part)


def _kind(name: str) -> Any:
    module, _, short = name.rpartition(".")
    return type(short, (_Part,), {"__module__": module})


CLASSES = {
    name.rpartition(".")[2]: _kind(name)
    for name in (
        "models.yolo.Model", "models.yolo.DetectionModel", "models.yolo.Detect", "models.common.Conv",
        "models.common.Bottleneck", "models.common.C3", "models.common.SPPF", "models.common.Concat",
        "models.common.Focus",
    )
}  # fmt: skip


def _conv(c1: int, c2: int, k: int = 1, s: int = 1, f: int | list[int] = -1) -> Any:
    norm: Any = nn.BatchNorm2d(c2, eps=1e-3)
    norm.running_mean.normal_(0, 0.1)
    norm.running_var.uniform_(0.5, 2)
    conv = nn.Conv2d(c1, c2, k, s, k // 2, bias=False)
    return CLASSES["Conv"](f, conv=conv, bn=norm, act=nn.SiLU())


def _c3(c1: int, c2: int) -> Any:
    block = CLASSES["Bottleneck"](cv1=_conv(c2 // 2, c2 // 2), cv2=_conv(c2 // 2, c2 // 2, 3), add=True)
    return CLASSES["C3"](cv1=_conv(c1, c2 // 2), cv2=_conv(c1, c2 // 2), cv3=_conv(c2, c2), m=nn.Sequential(block))


def _upsample() -> Any:
    layer: Any = nn.Upsample(None, 2, "nearest")
    layer.f = -1
    return layer


def make(names: list[str], era: str = "v7.0", extra: Any = None, strange_layer: bool = False) -> dict[str, Any]:
    """A checkpoint of two levels (strides 8 and 16). era v6.0: a list of names, and numpy figures beside."""
    torch.manual_seed(0)
    width = 3 * (5 + len(names))
    pool = CLASSES["SPPF"](cv1=_conv(16, 8), cv2=_conv(32, 16), m=nn.MaxPool2d(5, 1, 2))
    layers = [
        _conv(3, 8, 6, 2), _conv(8, 16, 3, 2), _conv(16, 16, 3, 2), _c3(16, 16), _conv(16, 16, 3, 2),
        CLASSES["Focus"]() if strange_layer else pool, _upsample(), CLASSES["Concat"]([-1, 3], d=1), _conv(32, 16),
        CLASSES["Detect"](
            [8, 5], nc=len(names), m=nn.ModuleList(nn.Conv2d(16, width, 1) for _ in range(2)),
            stride=torch.tensor([8, 16]).half(), anchors=torch.rand(2, 3, 2) * 4 + 1,
        ),
    ]  # fmt: skip
    layers[0].conv.padding = (2, 2)
    model = CLASSES["Model" if era == "v6.0" else "DetectionModel"](
        model=nn.Sequential(*layers), names=names if era == "v6.0" else dict(enumerate(names))
    )
    figure = np.array([0.5])[0] if era == "v6.0" else None
    return {
        "model": model.half(),
        "ema": None,
        "epoch": -1,
        "best_fitness": figure,
        "date": "2022",
        "extra": extra,
    }


def make_seeing(names: list[str], seen: str, era: str = "v7.0") -> dict[str, Any]:
    """A checkpoint whose network detects white squares on black as instances of the class `seen`.

    Every convolution passes the mean brightness of its centre on in one channel; the head's first anchor fires at the
    first level wherever it is bright.
    """
    checkpoint = make(names, era)
    model = checkpoint["model"].float()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
        if isinstance(module, nn.Conv2d):
            module.weight.data.zero_()
    layers = model.model
    layers[0].conv.weight.data[0, :, 2:4, 2:4] = 8 / 12  # SiLU leaves 8 nearly as it is
    for layer in (1, 2):
        layers[layer].conv.weight.data[0, 0, 1:3, 1:3] = 1 / 4
    for conv in (layers[3].cv1, layers[3].cv3):
        conv.conv.weight.data[0, 0] = 1
    layers[8].conv.weight.data[0, 16] = 1  # the second half of what Concat joins: layer 3
    detect, outputs = layers[9], 5 + len(names)
    for level, head in enumerate(detect.m):
        bias = torch.zeros(3, outputs)
        bias[:, 4] = -16
        bias[:, 5:] = -10
        bias[:, 5 + names.index(seen)] = 10
        head.bias.data = bias.flatten()
        if level == 0:
            head.weight.data[4, 0] = 4  # objectness of the first anchor
    detect.anchors[:] = 8  # cells of the first level: 64 pixels
    return {**checkpoint, "model": model.half()}


def centre(i: int) -> tuple[float, float]:
    """The centre of a square in a picture of 640 pixels."""
    return 88 + i % 3 * 200, 88 + i // 3 * 200


def squares(count: int, size: int = 640) -> bytes:
    """A picture with up to nine white squares on black, which make_seeing() counts at any size."""
    pixels = np.zeros((640, 640), np.uint8)
    for x, y in map(centre, range(count)):
        pixels[int(y) - 8 : int(y) + 8, int(x) - 8 : int(x) + 8] = 255
    return encode(Image.fromarray(pixels).convert("RGB").resize((size, size)))


def save(path: Path, *arguments: Any, **options: Any) -> Path:
    """Write a checkpoint of make() as YOLOv5 does."""
    return write(path, make(*arguments, **options))


def write(path: Path, checkpoint: dict[str, Any]) -> Path:
    """Write a checkpoint as YOLOv5 does."""
    with importable():
        torch.save(checkpoint, path)
    return path


@contextlib.contextmanager
def importable() -> Iterator[None]:
    """YOLOv5's modules can be imported meanwhile."""
    modules = {name: types.ModuleType(name) for name in ("models", "models.yolo", "models.common")}
    for kind in CLASSES.values():
        setattr(modules[kind.__module__], kind.__name__, kind)
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]
