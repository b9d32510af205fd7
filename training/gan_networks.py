"""The networks of the GAN: the light-weight one of Liu et al., and a plain DCGAN of as many parameters.

Light: "Towards Faster and Stabilized GAN Training for High-fidelity Few-shot Image Synthesis", 2021,
https://arxiv.org/abs/2101.04775, for grey pictures and with fewer filters. DCGAN: Radford et al., 2015,
https://arxiv.org/abs/1511.06434. Differentiable augmentation: Zhao et al., 2020, https://arxiv.org/abs/2006.10738.

Pictures are [n, 1, size, size] with values from -1 (black) to 1 (white), latents are [n, latent].
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

SIZES = (32, 64, 128, 256)
# Filters at each side of the light networks' feature maps, as multiples of `width`; the proportions are the paper's.
FILTERS = {4: 16, 8: 8, 16: 4, 32: 2, 64: 2, 128: 1, 256: 0.5}
AUGMENTATIONS = ("brightness", "contrast", "translation", "cutout")


def filters(side: int, width: int) -> int:
    return max(2, int(FILTERS[side] * width))


def upsampled(incoming: int, outgoing: int) -> nn.Sequential:
    """Doubles the sides of feature maps."""
    return nn.Sequential(
        nn.Upsample(scale_factor=2, mode="nearest"),
        nn.Conv2d(incoming, 2 * outgoing, 3, padding=1, bias=False), nn.BatchNorm2d(2 * outgoing), nn.GLU(1),
    )  # fmt: skip


class SkipLayerExcitation(nn.Module):
    """Multiplies each channel of large feature maps by a factor from 0 to 1 that small feature maps decide."""

    def __init__(self, small: int, large: int) -> None:
        """small, large: numbers of channels."""
        super().__init__()
        self.factors = nn.Sequential(
            nn.AdaptiveAvgPool2d(4), nn.Conv2d(small, large, 4), nn.LeakyReLU(0.1), nn.Conv2d(large, large, 1),
            nn.Sigmoid(),
        )  # fmt: skip

    def forward(self, small: Tensor, large: Tensor) -> Tensor:
        excited: Tensor = large * self.factors(small)
        return excited


class LightGenerator(nn.Module):
    """Latents → pictures. The last resolutions are excited by those that are `factor` times smaller.

    The paper's factor is 16; it is less for pictures below 128 pixels, so that they have two excitations.
    """

    def __init__(self, size: int, latent: int, width: int) -> None:
        super().__init__()
        self.factor = min(16, size // 8)
        self.first = nn.Sequential(
            nn.ConvTranspose2d(latent, 2 * filters(4, width), 4, bias=False), nn.BatchNorm2d(2 * filters(4, width)),
            nn.GLU(1),
        )  # fmt: skip
        self.sides = [4 << number for number in range(1, (size // 4).bit_length())]
        self.up = nn.ModuleList(upsampled(filters(side // 2, width), filters(side, width)) for side in self.sides)
        self.excitations = nn.ModuleDict(
            {
                str(side): SkipLayerExcitation(filters(side // self.factor, width), filters(side, width))
                for side in self.sides
                if side // self.factor >= 4
            }
        )
        self.last = nn.Sequential(nn.Conv2d(filters(size, width), 1, 3, padding=1), nn.Tanh())

    def forward(self, latents: Tensor) -> Tensor:
        maps = {4: self.first(latents[:, :, None, None])}
        for side, up in zip(self.sides, self.up, strict=True):
            maps[side] = up(maps[side // 2])
            if str(side) in self.excitations:
                maps[side] = self.excitations[str(side)](maps[side // self.factor], maps[side])
        pictures: Tensor = self.last(maps[self.sides[-1]])
        return pictures


def normed(incoming: int, outgoing: int, kernel: int, stride: int = 1, padding: int = 0) -> nn.Sequential:
    convolution = nn.Conv2d(incoming, outgoing, kernel, stride, padding, bias=False)
    return nn.Sequential(spectral_norm(convolution), nn.BatchNorm2d(outgoing), nn.LeakyReLU(0.2))


class Halved(nn.Module):
    """Halves the sides of feature maps on two paths, whose mean is the result."""

    def __init__(self, incoming: int, outgoing: int) -> None:
        super().__init__()
        self.main = nn.Sequential(normed(incoming, outgoing, 4, 2, 1), normed(outgoing, outgoing, 3, padding=1))
        self.direct = nn.Sequential(nn.AvgPool2d(2), normed(incoming, outgoing, 1))

    def forward(self, maps: Tensor) -> Tensor:
        halved: Tensor = (self.main(maps) + self.direct(maps)) / 2
        return halved


class Decoder(nn.Sequential):
    """Feature maps → pictures whose sides are 2 ** doublings times as large."""

    def __init__(self, channels: int, doublings: int, width: int) -> None:
        widths = [channels, *(max(4, 4 * width >> number) for number in range(doublings))]
        super().__init__(
            *(upsampled(one, other) for one, other in itertools.pairwise(widths)),
            nn.Conv2d(widths[-1], 1, 3, padding=1), nn.Tanh(),
        )  # fmt: skip


class LightDiscriminator(nn.Module):
    """Pictures → logits, and for real pictures the loss of reconstructing them from two of its feature maps.

    The reconstruction is the paper's self-supervision: `whole` decodes the last feature maps, and `part` decodes a
    random quarter of those that are twice as large. The paper compares with a pretrained network's features; here it
    is the mean absolute difference of the pixels.
    """

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.side = max(4, size // 32)
        stem = max(1, size // 64)  # large pictures are made smaller at once, which saves most of the time
        sides = [size // stem]
        while sides[-1] > self.side:
            sides.append(sides[-1] // 2)
        first = nn.Conv2d(1, filters(sides[0], width), 3 if stem == 1 else 2 * stem, stem, max(1, stem // 2))
        self.stem = nn.Sequential(spectral_norm(first), nn.LeakyReLU(0.2))
        self.down = nn.ModuleList(
            Halved(filters(one, width), filters(other, width)) for one, other in itertools.pairwise(sides)
        )
        last = filters(self.side, width)
        self.judge = nn.Sequential(normed(last, last, 1), spectral_norm(nn.Conv2d(last, 1, 4, bias=False)))
        self.whole = Decoder(last, 3, width)
        self.part = Decoder(filters(2 * self.side, width), 2, width)

    def maps(self, pictures: Tensor) -> list[Tensor]:
        """Returns the last two feature maps, [n, channels, 2 · side, 2 · side] and [n, channels, side, side]."""
        found = [self.stem(pictures)]
        for down in self.down:
            found.append(down(found[-1]))
        return found[-2:]

    def forward(self, pictures: Tensor) -> Tensor:
        logits: Tensor = self.judge(self.maps(pictures)[1])
        return logits.flatten()

    def judged_and_reconstructed(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the logits and the reconstruction's loss."""
        larger, last = self.maps(pictures)
        top, left = (int(one) for one in torch.randint(self.side + 1, (2,)))
        crop = larger[:, :, top : top + self.side, left : left + self.side]
        scale = pictures.shape[-1] // (2 * self.side)
        area = slice(top * scale, (top + self.side) * scale), slice(left * scale, (left + self.side) * scale)
        loss = torch.zeros((), device=pictures.device)
        for decoded, original in (
            (self.whole(last), pictures), (self.part(crop), pictures[:, :, area[0], area[1]]),
        ):  # fmt: skip
            loss = loss + F.l1_loss(decoded, F.adaptive_avg_pool2d(original, decoded.shape[-1]))
        return self.judge(last).flatten(), loss


class DcganGenerator(nn.Sequential):
    """Latents → pictures, by transposed convolutions."""

    def __init__(self, size: int, latent: int, width: int) -> None:
        widths = [latent, *(width * min(8, size // side // 2) for side in _sides(size))]
        layers: list[nn.Module] = [nn.Unflatten(1, (latent, 1, 1))]
        for number, (one, other) in enumerate(itertools.pairwise(widths)):
            stride, padding = (2, 1) if number else (1, 0)
            layers += [
                nn.ConvTranspose2d(one, other, 4, stride, padding, bias=False), nn.BatchNorm2d(other), nn.ReLU(),
            ]  # fmt: skip
        super().__init__(*layers, nn.ConvTranspose2d(widths[-1], 1, 4, 2, 1), nn.Tanh())
        self.apply(_initialise)


class DcganDiscriminator(nn.Sequential):
    """Pictures → logits, by convolutions with stride 2."""

    def __init__(self, size: int, width: int) -> None:
        widths = [1, *(width * min(8, size // side // 2) for side in reversed(_sides(size)))]
        layers: list[nn.Module] = []
        for number, (one, other) in enumerate(itertools.pairwise(widths)):
            layers += [
                nn.Conv2d(one, other, 4, 2, 1, bias=not number),
                *([nn.BatchNorm2d(other)] if number else []), nn.LeakyReLU(0.2),
            ]  # fmt: skip
        super().__init__(*layers, nn.Conv2d(widths[-1], 1, 4), nn.Flatten(0))
        self.apply(_initialise)


def _sides(size: int) -> list[int]:
    """Returns 4, 8, … up to half of the size."""
    return [4 << number for number in range((size // 4).bit_length() - 1)]


def _initialise(layer: nn.Module) -> None:
    """Draws DCGAN's initial weights."""
    if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(layer.weight, 0.0, 0.02)
    elif isinstance(layer, nn.BatchNorm2d):
        nn.init.normal_(layer.weight, 1.0, 0.02)


def parameters(network: nn.Module) -> int:
    return sum(one.numel() for one in network.parameters())


def build(model: str, size: int, latent: int, width: int) -> tuple[nn.Module, nn.Module]:
    """Returns the generator and the discriminator. DCGAN's have as many parameters as the light ones of that width."""
    if model == "light":
        return LightGenerator(size, latent, width), LightDiscriminator(size, width)

    def of_equal_size(make: Callable[[int], nn.Module], light: nn.Module) -> nn.Module:
        # The number of parameters is a polynomial of degree 2 in the width.
        curve = np.polyfit((1, 2, 3), [parameters(make(one)) for one in (1, 2, 3)], 2)
        return make(max(1, round(np.roots(curve - [0, 0, parameters(light)]).real.max())))

    return (
        of_equal_size(lambda one: DcganGenerator(size, latent, one), LightGenerator(size, latent, width)),
        of_equal_size(lambda one: DcganDiscriminator(size, one), LightDiscriminator(size, width)),
    )


def augment(pictures: Tensor, names: Sequence[str]) -> Tensor:
    """Changes each picture at random, so that gradients pass; real and generated ones must be changed alike.

    brightness, contrast: of the whole picture. translation: by up to an eighth of the side; cutout: of a square of half
    the side, both filled with grey. The random numbers are drawn on the CPU, so that a seed means the same everywhere.
    """
    count, _, size, _ = pictures.shape
    place = torch.arange(size, device=pictures.device)

    def drawn(low: float, high: float) -> Tensor:
        return (torch.rand(count, 1, 1) * (high - low) + low).to(pictures.device)

    if "brightness" in names:
        pictures = pictures + drawn(-0.5, 0.5)[:, None]
    if "contrast" in names:
        mean = pictures.mean((1, 2, 3), keepdim=True)
        pictures = (pictures - mean) * drawn(0.5, 1.5)[:, None] + mean
    if "translation" in names:
        # As products with matrices of zeros and ones: the gradient of indexing depends on the order of additions.
        down, right = ((drawn(-size / 8, size / 8).round() + place[:, None] == place).to(pictures) for _ in "yx")
        pictures = down[:, None] @ pictures @ right[:, None].mT
    if "cutout" in names:
        rows, columns = ((place - drawn(0, size)).abs() < size / 4 for _ in "yx")
        pictures = pictures * ~(rows.mT & columns)[:, None]
    return pictures
