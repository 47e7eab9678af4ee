"""Domains: the same pictures as another camera, printer or hand would give them.

A shift makes a data set's images over, all of them by the same rule and always alike: what becomes
of an image depends on its place in its set and on nothing of the run. So every machine has the
same domains, and a teacher that is trained on one of them (`data.domains`), or a property that is
measured on another (`shifted`), means the same in every run.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import torch
from torch import Tensor
from torch.nn import functional

from fedkd.data import SHIFTS
from fedkd.data.images import ImageSet
from fedkd.functional.options import Positive, Range, options_checked
from fedkd.randomness import stream

Make = Callable[..., Tensor]

# Images that are made over at once: their copies in float64 are eight times the size.
_AT_ONCE = 2000


@dataclass(frozen=True)
class Shift:
    """One domain.

    Attributes:
        name: A registered shift.
        options: Its options.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        """`rotate`, or with options `rotate degrees=90`."""
        return " ".join([self.name, *(f"{key}={value}" for key, value in self.options.items())])


@dataclass(frozen=True)
class Domains:
    """What a federation, or a study's teachers, learn in and what their student is for.

    Attributes:
        sources: Domains of the labelled private images, dealt to clients in turn.
        target: Domain of the transfer set, of the server's validation images and of the test set.

    Raises:
        ValueError: a domain that there is not, or a source that is listed twice.
    """

    sources: tuple[Shift, ...]
    target: Shift

    def __post_init__(self) -> None:
        for number, shift in enumerate(self.sources):
            SHIFTS.check(shift.name, shift.options)
            if shift in self.sources[:number]:
                raise ValueError(f"sources: {shift} is listed twice")
        SHIFTS.check(self.target.name, self.target.options)

    def number_of(self, client: int) -> int:
        """The place of a client's domain among the sources."""
        return client % len(self.sources)

    def shown(self, images: ImageSet, shift: Shift, part: str) -> ImageSet:
        """A set in one of these domains, with as many channels as the others."""
        made = shifted(images, shift, part)
        colour = any(one.name == "colour" for one in (*self.sources, self.target))
        return coloured(made) if colour else made


def shifted(images: ImageSet, shift: Shift | str, part: str = "test") -> ImageSet:
    """A set of images in another domain, uint8 like the first and with the same labels.

    Args:
        images: The whole set: random shifts draw one image after the other.
        shift: Which; a name alone has its default options. `colour` gives three channels,
            the others as many as there were (`coloured` gives all of them three).
        part: Which set of its data set this is (`train`, `test`), for what is drawn.

    Raises:
        ValueError: unknown name or option, or images that it cannot be done to.
    """
    chosen = shift if isinstance(shift, Shift) else Shift(shift)
    options = SHIFTS.check(chosen.name, chosen.options)
    make, generator = SHIFTS.get(chosen.name), stream(0, "domain", str(chosen), part)
    parts = torch.arange(len(images)).split(_AT_ONCE)
    pixels = [make(images.subset(rows), generator, **options) for rows in parts]
    return replace(images, images=torch.cat(pixels) if pixels else images.images)


def coloured(images: ImageSet) -> ImageSet:
    """Grey images with three equal channels; others as they are."""
    if images.shape[0] != 1:
        return images
    return replace(images, images=images.images.repeat(1, 3, 1, 1))


def _shift(name: str) -> Callable[[Make], Make]:
    """Decorator of the shift `name`, whose options are checked."""

    def decorate(function: Make) -> Make:
        return SHIFTS.register(name)(options_checked(f"shift {name!r}")(function))

    return decorate


@_shift("plain")
def plain(images: ImageSet, generator: torch.Generator) -> Tensor:
    """The images as they are."""
    return images.images


@_shift("invert")
def invert(images: ImageSet, generator: torch.Generator) -> Tensor:
    """Bright for dark and dark for bright."""
    return 255 - images.images


@_shift("blur")
def blur(images: ImageSet, generator: torch.Generator, *, sigma: Positive = 1.5) -> Tensor:
    """Gaussian blur; the border is repeated.

    Args:
        sigma: Standard deviation in pixels.
    """
    reach = math.ceil(3 * sigma)
    weights = [math.exp(-0.5 * (step / sigma) ** 2) for step in range(-reach, reach + 1)]
    pixels = images.images.double()
    for axis in (-1, -2):
        size = pixels.shape[axis]
        # Term by term, since a convolution adds up in an order of its own on each machine.
        total = torch.zeros_like(pixels)
        for step, weight in zip(range(-reach, reach + 1), weights, strict=True):
            rows = torch.arange(step, size + step).clamp(0, size - 1)
            total = total + weight / sum(weights) * pixels.index_select(axis, rows)
        pixels = total
    return _bytes(pixels)


@_shift("edges")
def edges(images: ImageSet, generator: torch.Generator) -> Tensor:
    """Length of the Sobel gradient; a step from black to white is white, the border is repeated."""
    pixels = functional.pad(images.images.double(), (1, 1, 1, 1), mode="replicate")
    height, width = images.shape[1:]

    def at(row: int, column: int) -> Tensor:
        return pixels[..., 1 + row : 1 + row + height, 1 + column : 1 + column + width]

    across = sum((2 - abs(r)) * (at(r, 1) - at(r, -1)) for r in (-1, 0, 1))
    down = sum((2 - abs(c)) * (at(1, c) - at(-1, c)) for c in (-1, 0, 1))
    assert isinstance(across, Tensor)
    return _bytes((across.square() + down * down).sqrt() / 4)


@_shift("noise")
def noise(images: ImageSet, generator: torch.Generator, *, sigma: Positive = 0.25) -> Tensor:
    """Gaussian noise on every pixel.

    Args:
        sigma: Standard deviation; pixels span 0 to 1.
    """
    drawn = torch.randn(images.images.shape, generator=generator, dtype=torch.float64)
    return _bytes(images.images.double() + 255 * sigma * drawn)


@_shift("colour")
def colour(
    images: ImageSet,
    generator: torch.Generator,
    *,
    biased: Annotated[float, Range(lambda x: 0 <= x <= 1, "from 0 to 1")] = 0.0,
) -> Tensor:
    """Every image in one colour; as many colours as classes.

    Args:
        biased: Chance of an image to have its class's colour instead of any.
    """
    count = len(images.classes)
    palette = torch.tensor(
        [[round(255 * c) for c in colorsys.hsv_to_rgb(n / count, 1, 1)] for n in range(count)]
    )
    drawn = torch.randint(count, (len(images),), generator=generator)
    chances = torch.rand(len(images), generator=generator)
    if biased > 0:
        if images.labels is None:
            raise ValueError("shift 'colour': biased needs labels, these images have none")
        # A set's colours follow what is in the pictures, whatever its labels say of it.
        true = images.labels if images.true_labels is None else images.true_labels
        drawn = torch.where(chances < biased, true, drawn)
    light = images.images.long()
    if len(light[0]) == 3:
        light = (light * torch.tensor([299, 587, 114])[:, None, None]).sum(dim=1, keepdim=True)
        light = (light + 500) // 1000
    return ((light * palette[drawn][:, :, None, None] + 127) // 255).to(torch.uint8)


@_shift("rotate")
def rotate(images: ImageSet, generator: torch.Generator, *, degrees: float = 30.0) -> Tensor:
    """Turned about the centre, counter-clockwise; what comes in from outside is black.

    Args:
        degrees: By how much.
    """
    angle = math.radians(degrees)
    return _turned(images.images, math.cos(angle), math.sin(angle))


@_shift("scale")
def scale(
    images: ImageSet,
    generator: torch.Generator,
    *,
    factor: Positive = 0.6,
) -> Tensor:
    """Smaller or larger about the centre; what comes in from outside is black.

    Args:
        factor: Size of what is shown, of its size before.
    """
    return _turned(images.images, 1 / factor, 0.0)


def _turned(images: Tensor, along: float, across: float) -> Tensor:
    """Each pixel from where the matrix (along, -across; across, along) about the centre puts it.

    Bilinear, with weights in 256ths: whole numbers add up alike on every machine.
    """
    height, width = images.shape[-2:]
    down = torch.arange(height, dtype=torch.float64) - (height - 1) / 2
    right = torch.arange(width, dtype=torch.float64) - (width - 1) / 2
    rows = along * down[:, None] + across * right[None, :] + (height - 1) / 2
    columns = along * right[None, :] - across * down[:, None] + (width - 1) / 2
    rows, columns = (256 * rows).round().long(), (256 * columns).round().long()
    total = torch.zeros(images.shape, dtype=torch.int64)
    for below in (0, 1):
        for beyond in (0, 1):
            row, column = rows // 256 + below, columns // 256 + beyond
            weight = (rows % 256 if below else 256 - rows % 256) * (
                columns % 256 if beyond else 256 - columns % 256
            )
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            there = images[..., row.clamp(0, height - 1), column.clamp(0, width - 1)]
            total = total + there.long() * (weight * inside)
    return ((total + 2**15) // 2**16).to(torch.uint8)


def _bytes(pixels: Tensor) -> Tensor:
    return pixels.round().clamp(0, 255).to(torch.uint8)
