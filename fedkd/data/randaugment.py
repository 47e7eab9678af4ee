"""RandAugment of a whole batch at once, on whatever device it lies.

torchvision applies one operation to all that it is given, so a batch would have to go through it
image by image. Here every image still draws its own two operations and directions. On a CPU images
with the same operation are changed together. Elsewhere launches cost more than pixels: all
operations become one, whose numbers are looked up for each image, and nothing passes the host.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fedkd.randomness import beside

# Magnitudes run from 0 to 30, as in the paper's code and torchvision's.
LARGEST = 30


def randaugment_batch(
    images: Tensor, generator: torch.Generator, *, operations: int = 2, magnitude: int = 9
) -> Tensor:
    """Change every image by operations of its own, uint8 (B, C, h, w) -> uint8 (B, C, h, w).

    Args:
        images: With 1 or 3 channels.
        generator: On the CPU, or beside the images.
        operations: How many, one after the other.
        magnitude: How strong, of 30.

    References:
        Cubuk et al., "RandAugment", NeurIPS 2020, https://arxiv.org/abs/1909.13719
    """
    share = magnitude / LARGEST
    if images.device.type != "cpu":
        return _all_at_once(images, beside(generator, images.device), operations, share)
    for _ in range(operations):
        # Drawn here and not on the device: the sizes of the groups are needed to launch them.
        drawn = torch.randint(len(OPERATIONS), (len(images),), generator=generator)
        counts = torch.bincount(drawn, minlength=len(OPERATIONS)).tolist()
        order = torch.randperm(len(images), generator=generator)
        coins = torch.randint(2, (len(images), 1, 1, 1), generator=generator)
        groups = zip(
            OPERATIONS.values(), images[order].split(counts), (2.0 * coins - 1).split(counts)
        )
        changed = [change(part, signs, share) for change, part, signs in groups if len(part)]
        result = torch.empty_like(images)
        result[order] = torch.cat([images[:0], *changed])
        images = result
    return images


def _all_at_once(
    images: Tensor, generator: torch.Generator, operations: int, share: float
) -> Tensor:
    count, device = (len(images),), images.device
    for _ in range(operations):
        drawn = torch.randint(len(OPERATIONS), count, generator=generator, device=device)
        coins = torch.randint(2, count, generator=generator, device=device)
        images = apply_each(images, drawn, coins, share)
    return images


def apply_each(images: Tensor, drawn: Tensor, coins: Tensor, share: float) -> Tensor:
    """Operation `drawn[i]` of `OPERATIONS` on image i, whatever the others', all at once.

    Args:
        images: uint8 (B, C, h, w).
        drawn: Numbers of operations, (B,).
        coins: Directions, 0 or 1, (B,).
        share: Magnitude in [0, 1].
    """
    channels, height, width = images.shape[1:]
    return _tables(channels, height, width, share, images.device).apply(images, 2 * drawn + coins)


@dataclass(frozen=True)
class Tables:
    """What each operation does in each direction, row by row, so that any mixture is one gather.

    Row 2 n is operation n of `OPERATIONS` with sign -1, row 2 n + 1 that with sign 1.

    Attributes:
        places: Which pixel comes to each place, from 1; 0 is black, (28, h * w).
        blends: Factor of the image, and shares of the other images in what it is blended with:
            grey, mean grey and smoothed, (28, 4, 1, 1, 1).
        bits: Bits that stay, (28, 1, 1, 1).
        bright: Pixels from here on are inverted, (28, 1, 1, 1).
        stretched: Whether contrast is stretched, (28, 1, 1, 1).
        flattened: Whether the histogram is, (28, 1, 1, 1).
    """

    places: Tensor
    blends: Tensor
    bits: Tensor
    bright: Tensor
    stretched: Tensor
    flattened: Tensor

    def apply(self, images: Tensor, rows: Tensor) -> Tensor:
        """The operation of row `rows[i]` on image i, uint8 (B, C, h, w)."""
        shape, signs = images.shape, images.new_zeros(())
        padded = functional.pad(images.flatten(2), (1, 0))
        places = self.places[rows][:, None].expand(-1, shape[1], -1)
        images = padded.gather(2, places).view(shape)
        factor, of_grey, of_mean, of_smooth = self.blends[rows].unbind(dim=1)
        grey = _grey(images)
        other = of_grey * grey + of_mean * grey.mean(dim=(1, 2, 3), keepdim=True)
        if min(shape[2:]) > 2:
            other = other + of_smooth * _smoothed(images)
        mixed = images * factor + other * (1 - factor)
        images = mixed.clamp_(0, 255).to(torch.uint8) & self.bits[rows]
        images = torch.where(images < self.bright[rows], images, 255 - images)
        images = torch.where(self.stretched[rows], autocontrast(images, signs, 0.0), images)
        return torch.where(self.flattened[rows], equalize(images, signs, 0.0), images)


@lru_cache(maxsize=16)
def _tables(channels: int, height: int, width: int, share: float, device: torch.device) -> Tables:
    """Made on the host, once, of the operations themselves."""
    numbers = torch.arange(1.0, height * width + 1).view(1, 1, height, width)
    color_is_none, small = channels == 1, min(height, width) <= 2
    places, blends, bits, bright, stretched, flattened = [], [], [], [], [], []
    for change in OPERATIONS.values():
        for sign in (-1.0, 1.0):
            signs = torch.full((1, 1, 1, 1), sign)
            moves = change in (shear_x, shear_y, translate_x, translate_y, rotate)
            places.append((change(numbers, signs, share) if moves else numbers).long().flatten())
            others = [change is color, change is contrast, change is sharpness]
            blended = change is brightness or any(others)
            if (change is color and color_is_none) or (change is sharpness and small):
                blended = False
            factor = (1 + 0.9 * share * signs).view(()) if blended else torch.ones(())
            blends.append(torch.stack([factor, *map(torch.tensor, map(float, others))]))
            bits.append(_bits(share) if change is posterize else 255)
            bright.append(255 * (1 - share) if change is solarize else 256.0)
            stretched.append(change is autocontrast)
            flattened.append(change is equalize)

    def column(values: list[Any], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device).view(-1, 1, 1, 1)

    return Tables(
        torch.stack(places).to(device),
        torch.stack(blends).view(-1, 4, 1, 1, 1).to(device),
        column(bits, torch.uint8),
        column(bright, torch.float32),
        column(stretched, torch.bool),
        column(flattened, torch.bool),
    )


# -- operations: (images, signs (B, 1, 1, 1), magnitude in [0, 1]) -> images -----------------------


def identity(images: Tensor, signs: Tensor, share: float) -> Tensor:
    """As they are."""
    return images


def shear_x(images: Tensor, signs: Tensor, share: float) -> Tensor:
    """Rows pushed sideways in proportion to their distance from the top."""
    slope = 0.3 * share * signs
    return _moved(images, x=(1.0, slope, slope * (images.shape[-2] / 2)), y=(0.0, 1.0, 0.0))


def shear_y(images: Tensor, signs: Tensor, share: float) -> Tensor:
    """Columns pushed up or down in proportion to their distance from the left."""
    slope = 0.3 * share * signs
    return _moved(images, x=(1.0, 0.0, 0.0), y=(slope, 1.0, slope * (images.shape[-1] / 2)))


def translate_x(images: Tensor, signs: Tensor, share: float) -> Tensor:
    """Moved sideways by whole pixels, up to 45 % of the width."""
    pixels = int(150 / 331 * images.shape[-1] * share)
    return _moved(images, x=(1.0, 0.0, -pixels * signs), y=(0.0, 1.0, 0.0))


def translate_y(images: Tensor, signs: Tensor, share: float) -> Tensor:
    """Moved up or down by whole pixels, up to 45 % of the height."""
    pixels = int(150 / 331 * images.shape[-2] * share)
    return _moved(images, x=(1.0, 0.0, 0.0), y=(0.0, 1.0, -pixels * signs))


def rotate(images: Tensor, signs: Tensor, share: float) -> Tensor:
    """Turned by up to 30 degrees."""
    angle = math.radians(30 * share)
    sine = math.sin(angle) * signs
    return _moved(images, x=(math.cos(angle), -sine, 0.0), y=(sine, math.cos(angle), 0.0))


def brightness(images: Tensor, signs: Tensor, share: float) -> Tensor:
    """Towards black or away from it."""
    return _blended(images, images.new_zeros(()), signs, share)


def color(images: Tensor, signs: Tensor, share: float) -> Tensor:
    """Towards grey or away from it."""
    return images if images.shape[1] == 1 else _blended(images, _grey(images), signs, share)


def contrast(images: Tensor, signs: Tensor, share: float) -> Tensor:
    """Towards the image's mean grey or away from it."""
    return _blended(images, _grey(images).mean(dim=(1, 2, 3), keepdim=True), signs, share)


def sharpness(images: Tensor, signs: Tensor, share: float) -> Tensor:
    """Towards a smoothed image or away from it; the outermost pixels stay."""
    height, width = images.shape[-2:]
    if height <= 2 or width <= 2:
        return images
    return _blended(images, _smoothed(images), signs, share)


def posterize(images: Tensor, signs: Tensor, share: float) -> Tensor:
    """Fewer bits, down to four."""
    return images & _bits(share)


def solarize(images: Tensor, signs: Tensor, share: float) -> Tensor:
    """Bright pixels inverted."""
    return torch.where(images < 255 * (1 - share), images, 255 - images)


def autocontrast(images: Tensor, signs: Tensor, share: float) -> Tensor:
    """Each channel stretched from black to white."""
    low = images.amin(dim=(-2, -1), keepdim=True)
    spread = (images.amax(dim=(-2, -1), keepdim=True) - low).float()
    stretched = (images - low).float() / (spread * (1 / 255)).clamp(min=1e-6)
    return torch.where(spread == 0, images, stretched.clamp(0, 255).to(torch.uint8))


def equalize(images: Tensor, signs: Tensor, share: float) -> Tensor:
    """Each channel's histogram flattened, by Pillow's integer rule."""
    flat = images.flatten(2).long()
    counts = torch.zeros(*flat.shape[:2], 256, dtype=torch.int64, device=images.device)
    counts.scatter_add_(2, flat, torch.ones_like(flat))
    total = counts.cumsum(dim=2)
    brightest = counts.gather(2, total.argmax(dim=2, keepdim=True))
    step = (flat.shape[2] - brightest) // 255
    table = (total - counts + step // 2) // step.clamp(min=1)
    table = torch.where(step == 0, torch.arange(256, device=images.device), table.clamp(0, 255))
    return table.gather(2, flat).view(images.shape).to(torch.uint8)


_Change = Callable[[Tensor, Tensor, float], Tensor]

OPERATIONS: dict[str, _Change] = {
    operation.__name__: operation
    for operation in (
        identity, shear_x, shear_y, translate_x, translate_y, rotate, brightness, color, contrast,
        sharpness, posterize, solarize, autocontrast, equalize,
    )
}  # fmt: skip


def _bits(share: float) -> int:
    return 256 - 2 ** round(4 * share)


_Row = tuple[float | Tensor, float | Tensor, float | Tensor]


def _moved(images: Tensor, *, x: _Row, y: _Row) -> Tensor:
    """Each pixel taken from (x, y) = rows . (x, y, 1), from the centre; black from outside."""
    count, height, width = len(images), *images.shape[-2:]
    theta = torch.zeros(count, 2, 3, device=images.device)
    for axis, (row, size) in enumerate(((x, width), (y, height))):
        for place, entry in enumerate(row):
            value = entry.view(count) if isinstance(entry, Tensor) else entry
            theta[:, axis, place] = value / (0.5 * size)
    across = torch.linspace((1 - width) / 2, (width - 1) / 2, width, device=images.device)
    down = torch.linspace((1 - height) / 2, (height - 1) / 2, height, device=images.device)
    places = torch.stack(
        [
            across.expand(height, width),
            down[:, None].expand(height, width),
            across.new_ones(height, width),
        ],
        dim=-1,
    )
    grid = torch.einsum("hwk,bak->bhwa", places, theta)
    taken = functional.grid_sample(images.float(), grid, mode="nearest", align_corners=False)
    return taken.round_().to(images.dtype)


def _smoothed(images: Tensor) -> Tensor:
    """Each pixel less sharp, but for the outermost; floats."""
    pixels, channels = images.float(), images.shape[1]
    kernel = pixels.new_full((channels, 1, 3, 3), 1 / 13)
    kernel[:, :, 1, 1] = 5 / 13
    smooth = pixels.clone()
    smooth[..., 1:-1, 1:-1] = functional.conv2d(pixels, kernel, groups=channels).round_()
    return smooth


def _blended(images: Tensor, other: Tensor, signs: Tensor, share: float) -> Tensor:
    """`other` at factor 0, the images at 1; the factor is 1 plus or minus 0.9 * share."""
    factor = 1 + 0.9 * share * signs
    mixed = images * factor + other * (1 - factor)
    return mixed.clamp_(0, 255).to(torch.uint8)


def _grey(images: Tensor) -> Tensor:
    """(B, 1, h, w), whole numbers as floats."""
    if images.shape[1] == 1:
        return images.float()
    red, green, blue = images.float().split(1, dim=1)
    return (0.2989 * red + 0.587 * green + 0.114 * blue).floor()
