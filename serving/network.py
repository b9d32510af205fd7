"""The YOLOv5 network: six plain modules, and a loader that runs no code of a checkpoint.

A published checkpoint is a pickle of module objects. Here each object it names becomes an inert `_Node`
that only keeps its state; the network is then built from the numbers and tensors found there. Every
convolution is fused with its batch normalisation while it is built.

Architecture: https://github.com/ultralytics/yolov5 (releases v6.0 and v7.0; n, s, m, l, x).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class CheckpointError(Exception):
    """A checkpoint that cannot be served; the message gives the reason and a remedy."""


class Conv(nn.Module):
    """Convolution with folded batch normalisation, then SiLU: (N, C, H, W) → (N, C', H/s, W/s)."""

    def __init__(self, conv: nn.Conv2d, act: nn.Module) -> None:
        super().__init__()
        self.conv = conv
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(self.conv(x))
        return out


class Bottleneck(nn.Module):
    """1×1 then 3×3 convolution, added to its input where the widths agree."""

    def __init__(self, cv1: Conv, cv2: Conv, add: bool) -> None:
        super().__init__()
        self.cv1, self.cv2, self.add = cv1, cv2, add

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.cv2(self.cv1(x))
        return x + y if self.add else y


class C3(nn.Module):
    """Cross-stage partial block: a stack of bottlenecks beside a 1×1 shortcut, merged by a third convolution."""

    def __init__(self, cv1: Conv, cv2: Conv, cv3: Conv, m: nn.Sequential) -> None:
        super().__init__()
        self.cv1, self.cv2, self.cv3, self.m = cv1, cv2, cv3, m

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), 1))
        return out


class SPPF(nn.Module):
    """Spatial pyramid pooling: the same max-pool three times in a row, all stages kept."""

    def __init__(self, cv1: Conv, cv2: Conv, pool: nn.MaxPool2d) -> None:
        super().__init__()
        self.cv1, self.cv2, self.pool = cv1, cv2, pool

    def forward(self, x: Tensor) -> Tensor:
        x = self.cv1(x)
        y1 = self.pool(x)
        y2 = self.pool(y1)
        out: Tensor = self.cv2(torch.cat((x, y1, y2, self.pool(y2)), 1))
        return out


class Concat(nn.Module):
    """Joins feature maps of one size along the channels."""

    def forward(self, xs: list[Tensor]) -> Tensor:
        return torch.cat(xs, 1)


class Detect(nn.Module):
    """The head: one 1×1 convolution a level, anchors × (x, y, w, h, objectness, classes…) channels, as logits."""

    def __init__(self, convs: nn.ModuleList) -> None:
        super().__init__()
        self.m = convs

    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        return [conv(x) for conv, x in zip(self.m, xs, strict=True)]


@dataclass(frozen=True)
class Head:
    """How the head's logits become boxes.

    strides: pixels a cell of each level spans. anchors: (levels, anchors, 2) widths and heights in pixels.
    names: the classes whose logits the head still has, in order.
    """

    strides: tuple[int, ...]
    anchors: Tensor
    names: tuple[str, ...]


class Network(nn.Module):
    """Pixels in, logits of every level out.

    Input (N, 3, H, W), RGB, H and W multiples of the largest stride; values 0…255 of any dtype, since the
    division by 255 is part of the first convolution. Output: one (N, anchors × (5 + classes), H/s, W/s) a level.
    """

    def __init__(self, layers: nn.ModuleList, sources: list[list[int]], head: Head) -> None:
        super().__init__()
        self.layers = layers
        self.sources = sources
        self.head = head

    def forward(self, x: Tensor) -> list[Tensor]:
        layers: list[Any] = list(self.layers)
        x = x.to(layers[0].conv.weight.dtype).contiguous(memory_format=torch.channels_last)
        outputs: list[Any] = []
        for layer, sources in zip(layers, self.sources, strict=True):
            inputs = [outputs[j] for j in sources] if sources else [x]
            outputs.append(layer(inputs) if isinstance(layer, Concat | Detect) else layer(inputs[0]))
        logits: list[Tensor] = outputs[-1]
        return logits

    def on(self, device: torch.device, precision: torch.dtype) -> Network:
        """Move it there, in the layout that convolutions are fastest in."""
        return self.to(device, precision).to(memory_format=torch.channels_last)

    def keep_only(self, name: str) -> None:
        """Cut the head to one class: fewer channels to compute and nothing else to decode."""
        if name not in self.head.names:
            raise CheckpointError(
                f"the checkpoint has no class {name!r}; it has: {', '.join(self.head.names[:100])}. "
                "Set HEADCOUNT_CLASS to one of them."
            )
        wanted = self.head.names.index(name)
        anchors, per_anchor = self.head.anchors.shape[1], 5 + len(self.head.names)
        rows = [a * per_anchor + r for a in range(anchors) for r in (0, 1, 2, 3, 4, 5 + wanted)]
        detect: Any = self.layers[-1]
        for i, conv in enumerate(detect.m):
            small = nn.Conv2d(conv.in_channels, len(rows), 1)
            small.weight = nn.Parameter(conv.weight.detach()[rows].clone(), requires_grad=False)
            small.bias = nn.Parameter(conv.bias.detach()[rows].clone(), requires_grad=False)
            detect.m[i] = small
        self.head = Head(self.head.strides, self.head.anchors, (name,))


class _Node:
    """Stands for a pickled object: its state, without its behaviour."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        self.__dict__["state"] = state if isinstance(state, dict) else {}

    @property
    def kind(self) -> str:
        return type(self).__name__

    def get(self, name: str) -> Any:
        state = self.__dict__.get("state", {})
        for part in (state, *(state.get(k) or {} for k in ("_modules", "_parameters", "_buffers"))):
            if name in part:
                return part[name]
        raise CheckpointError(f"the checkpoint's {self.kind} has no {name!r}: it is not a YOLOv5 v6.0 or v7.0 model")

    def children(self) -> list[_Node]:
        return list(self.get("_modules").values())


# Everything a YOLOv5 checkpoint may name, under the names it is pickled with. numpy's appear in files of
# v6.0 and in custom ones (fitness figures); no value the network needs is among them.
_NAMES = [
    *(f"models.yolo.{name}" for name in ("Model", "DetectionModel", "Detect")),
    *(f"models.common.{name}" for name in ("Conv", "Bottleneck", "C3", "SPPF", "Concat")),
    *(f"torch.nn.modules.container.{name}" for name in ("ModuleList", "Sequential")),
    "torch.nn.modules.conv.Conv2d",
    "torch.nn.modules.batchnorm.BatchNorm2d",
    "torch.nn.modules.activation.SiLU",
    "torch.nn.modules.linear.Identity",
    "torch.nn.modules.pooling.MaxPool2d",
    "torch.nn.modules.upsampling.Upsample",
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    "numpy.dtype",
    "numpy.ndarray",
]
_ALLOWED: list[Any] = [(type(name.rsplit(".", 1)[1], (_Node,), {}), name) for name in _NAMES]


def load_network(path: Path) -> Network:
    """The network of a YOLOv5 checkpoint, float32, in evaluation mode, all its classes.

    Raises CheckpointError: the file is no checkpoint, or names anything beyond the allow-list.
    """
    try:
        asked = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    except Exception as error:
        raise CheckpointError(f"{path} is not a PyTorch checkpoint ({error}); fetch a YOLOv5 .pt file again") from None
    if foreign := sorted(set(asked) - set(_NAMES)):
        raise CheckpointError(
            f"{path} asks for {', '.join(foreign)}, which no YOLOv5 v6.0 or v7.0 network needs; "
            "it was refused and nothing in it was run"
        )
    try:
        with torch.serialization.safe_globals(_ALLOWED):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read as a checkpoint: {error}") from None
    model = (content.get("ema") or content.get("model")) if isinstance(content, Mapping) else content
    if not isinstance(model, _Node) or model.kind not in ("Model", "DetectionModel"):
        raise CheckpointError(f"{path} holds no YOLOv5 detection model")
    try:
        return _build(model).float().eval().requires_grad_(False)
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{path} does not hold a whole YOLOv5 model: {error!r}") from None


def _build(model: _Node) -> Network:
    nodes = model.get("model").children()
    detect = nodes[-1]
    if detect.kind != "Detect":
        raise CheckpointError(f"the last layer is {detect.kind}, not Detect: this is not a detection model")
    sources = [_absolute(node.get("f"), i) for i, node in enumerate(nodes)]
    layers = nn.ModuleList(_module(node) for node in nodes)
    first: Any = layers[0]
    first = first.conv
    first.weight = nn.Parameter(first.weight / 255)
    strides = detect.get("stride").float()
    names = model.get("names")
    names = tuple(str(n) for n in (names.values() if isinstance(names, Mapping) else names))
    # The checkpoint keeps anchors in cells of their level.
    anchors = detect.get("anchors").float() * strides[:, None, None]
    return Network(layers, sources, Head(tuple(int(s) for s in strides), anchors, names))


def _absolute(f: int | list[int], i: int) -> list[int]:
    """A layer's sources as layer numbers; empty means the picture itself."""
    return [j if j >= 0 else i + j for j in (f if isinstance(f, list) else [f]) if i + min(j, 0) >= 0]


def _module(node: _Node) -> nn.Module:
    match node.kind:
        case "Conv":
            return _conv(node)
        case "Bottleneck":
            return Bottleneck(_conv(node.get("cv1")), _conv(node.get("cv2")), bool(node.get("add")))
        case "C3":
            blocks = nn.Sequential(*(_module(child) for child in node.get("m").children()))
            return C3(_conv(node.get("cv1")), _conv(node.get("cv2")), _conv(node.get("cv3")), blocks)
        case "SPPF":
            size = int(node.get("m").get("kernel_size"))
            return SPPF(_conv(node.get("cv1")), _conv(node.get("cv2")), nn.MaxPool2d(size, 1, size // 2))
        case "Concat":
            return Concat()
        case "Upsample":
            return nn.Upsample(scale_factor=float(node.get("scale_factor")), mode="nearest")
        case "Detect":
            return Detect(nn.ModuleList(_conv2d(child) for child in node.get("m").children()))
        case other:
            raise CheckpointError(f"a layer of the kind {other} has no place in a YOLOv5 v6.0 or v7.0 model")


def _conv(node: _Node) -> Conv:
    conv = _conv2d(node.get("conv"))
    modules = node.get("_modules")
    if norm := modules.get("bn"):
        scale = norm.get("weight").float() / (norm.get("running_var").float() + norm.get("eps")).sqrt()
        bias = norm.get("bias").float() - norm.get("running_mean").float() * scale
        if conv.bias is not None:
            bias = bias + conv.bias.detach() * scale
        conv.weight = nn.Parameter(conv.weight.detach() * scale[:, None, None, None])
        conv.bias = nn.Parameter(bias)
    return Conv(conv, nn.Identity() if modules["act"].kind == "Identity" else nn.SiLU())


def _conv2d(node: _Node) -> nn.Conv2d:
    weight = node.get("weight").detach().float()
    bias = node.get("bias")
    groups = int(node.get("groups"))
    conv = nn.Conv2d(
        weight.shape[1] * groups, weight.shape[0], node.get("kernel_size"), node.get("stride"),
        node.get("padding"), node.get("dilation"), groups, bias=bias is not None,
    )  # fmt: skip
    conv.weight = nn.Parameter(weight)
    if bias is not None:
        conv.bias = nn.Parameter(bias.detach().float())
    return conv
