"""Augmented images: the virtual views every machine makes alike, and local training's recipes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fedkd.data.randaugment import LARGEST, OPERATIONS, apply_each, randaugment_batch
from fedkd.io.text import nearest
from fedkd.randomness import beside, stream, stream_seed

Strength = Literal["weak", "moderate", "strong"]

# Magnitude of RandAugment's two operations, of 30.
MAGNITUDES: dict[str, int] = {"weak": 4, "moderate": 9, "strong": 15}


def virtual_view(
    images: Tensor,
    *,
    seed: int,
    view: int,
    indices: Tensor | np.ndarray | Sequence[int] | None = None,
    strength: Strength = "moderate",
    flip: bool = False,
) -> Tensor:
    """Augment every image as its number says, uint8 (N, C, H, W) -> uint8 (N, C, H, W).

    Optional mirror image, shift by up to an eighth (the border is repeated by reflection), two
    RandAugment operations. Image `i` draws from the stream (seed, "view", view, i) and from
    nothing else, so a subset in any order has the same views as the whole.

    Args:
        images: The images.
        seed: The run's seed.
        view: Number of the view.
        indices: Number of every image in the whole set; default: 0, 1, 2, ...
        strength: How far the views are from the image.
        flip: Mirror half of the images; wrong for digits and letters.

    References:
        Cubuk et al., "RandAugment", NeurIPS 2020, https://arxiv.org/abs/1909.13719
    """
    _check_images(images)
    _check_name("strength", strength, MAGNITUDES)
    numbers = range(len(images)) if indices is None else [int(i) for i in indices]
    if len(numbers) != len(images):
        raise ValueError(f"{len(images)} images but {len(numbers)} indices")
    transforms = _transforms()
    vertical, horizontal = padding(images.shape[1:])
    steps: list[Callable[[Tensor], Tensor]] = [
        transforms.RandomCrop(
            tuple(images.shape[-2:]), padding=[horizontal, vertical], padding_mode="reflect"
        ),
        transforms.RandAugment(num_ops=2, magnitude=MAGNITUDES[strength]),
    ]
    if flip:
        steps.insert(0, transforms.RandomHorizontalFlip())
    seeds = [stream_seed(seed, "view", view, number) for number in numbers]
    return _one_by_one(images, steps, seeds)


def augment_batch(images: Tensor, recipe: str, seed: int, *names: object) -> Tensor:
    """Augment a batch for training, uint8 (N, C, H, W) -> uint8 (N, C, H, W) on its device.

    Args:
        images: The batch.
        recipe: One of `AUGMENTATIONS`.
        seed: The run's (or client's) seed.
        *names: Stream of this batch, e.g. `"augment", epoch, step`.

    Raises:
        ValueError: unknown recipe.
    """
    return augmented(images, recipe, stream(seed, *names))


class Draws:
    """Where batches draw their augmentations from.

    On a CPU each batch has a stream of its own. Elsewhere one generator on the device, seeded anew
    in each epoch, draws for all of them: nothing is seeded from the host between two steps, so
    that a step may be captured as a graph. Its numbers are others than a CPU's.

    Args:
        seed: The run's (or client's) seed.
        device: Where the images lie.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self._seed = seed
        self._device = device
        self._epoch: int | None = None
        self._generators: dict[tuple[object, ...], torch.Generator] = {}

    def __iter__(self) -> Iterator[torch.Generator]:
        """The generators on the device."""
        return iter(self._generators.values())

    def begin(self, epoch: int) -> None:
        """Draw the numbers of an epoch from its first on."""
        self._epoch = epoch
        for names, generator in self._generators.items():
            generator.manual_seed(stream_seed(self._seed, *names, epoch))

    def of(self, epoch: int, step: int, *names: object) -> torch.Generator:
        """The generator for a batch.

        Args:
            epoch: As in `begin`.
            step: Number of the batch; on a device batches draw one after the other.
            *names: What for, e.g. `"augment"`.
        """
        if self._device.type in ("cpu", "meta"):
            return stream(self._seed, *names, epoch, step)
        if self._epoch != epoch:
            self.begin(epoch)
        if names not in self._generators:
            own = torch.Generator(self._device)
            self._generators[names] = own.manual_seed(stream_seed(self._seed, *names, epoch))
        return self._generators[names]


def augmented(images: Tensor, recipe: str, generator: torch.Generator) -> Tensor:
    """As `augment_batch`, drawing from a generator on the CPU or beside the images."""
    _check_images(images)
    check_augmentation(recipe)
    return AUGMENTATIONS[recipe](images, generator)


def none(images: Tensor, generator: torch.Generator) -> Tensor:
    """The images as they are."""
    return images


def flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Half of the images mirrored: for photographs, not for digits."""
    own = beside(generator, images.device)
    mirrored = torch.rand(len(images), generator=own, device=images.device) < 0.5
    return torch.where(mirrored[:, None, None, None], images.flip(3), images)


def crop(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shifted by up to an eighth in both directions, black where nothing is left.

    The same as torchvision's RandomCrop with padding, but padded, drawn and cut for the whole
    batch at once, on the device where it lies.
    """
    vertical, horizontal = padding(images.shape[1:])
    height, width = images.shape[-2:]
    padded = functional.pad(images, (horizontal, horizontal, vertical, vertical))
    count, device = len(images), images.device
    own = beside(generator, device)
    top = torch.randint(2 * vertical + 1, (count,), generator=own, device=device)
    left = torch.randint(2 * horizontal + 1, (count,), generator=own, device=device)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)
    return windows[torch.arange(count, device=device), :, top, left]


def crop_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """`flip`, then `crop`."""
    return crop(flip(images, generator), generator)


def randaugment(images: Tensor, generator: torch.Generator) -> Tensor:
    """`crop`, then two RandAugment operations of magnitude 9."""
    return randaugment_batch(crop(images, generator), generator)


def randaugment_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """`crop_flip`, then two RandAugment operations of magnitude 9."""
    return randaugment_batch(crop_flip(images, generator), generator)


def autoaugment(images: Tensor, generator: torch.Generator) -> Tensor:
    """`crop_flip`, then AutoAugment's policy for CIFAR-10."""
    transforms = _transforms()
    policy = transforms.AutoAugment(transforms.AutoAugmentPolicy.CIFAR10)
    images = crop_flip(images, generator)
    place = generator.device
    seeds = torch.randint(2**62, (len(images),), generator=generator, device=place).tolist()
    return _one_by_one(images, [policy], seeds)


DRAWN = 6
"""Whole numbers that `draw` writes for each image; and one real number."""


def can_draw(recipe: str, device: torch.device) -> bool:
    """Whether `draw` and `drawn` do what the recipe does on this device."""
    return recipe in ("none", "flip", "crop", "crop_flip") or (
        recipe in ("randaugment", "randaugment_flip") and device.type != "cpu"
    )


def undrawn(
    steps: int, sizes: tuple[int, ...], shape: tuple[int, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Room for what `draw` writes, where images stay as they are.

    Args:
        steps: Number of batches.
        sizes: Of each batch, (..., B).
        shape: Of each image, (channels, height, width).
        device: Where it lies.

    Returns:
        int64 (steps, DRAWN, ..., B) and float32 (steps, ..., B).
    """
    whole = torch.zeros(steps, DRAWN, *sizes, dtype=torch.int64, device=device)
    whole[:, 0], whole[:, 1] = padding(shape)
    return whole, torch.ones(steps, *sizes, device=device)


def draw(
    recipe: str, shape: tuple[int, ...], generator: torch.Generator, whole: Tensor, real: Tensor
) -> None:
    """What a recipe draws for some images, in its order, so that `drawn` can be one for many.

    Args:
        recipe: One that `can_draw` knows.
        shape: Of each image, (channels, height, width).
        generator: As the recipe takes it.
        whole: Written where the recipe draws, of `undrawn`.
        real: Likewise.
    """
    vertical, horizontal = padding(shape)
    count = (len(real),)
    if recipe.endswith("flip"):
        torch.rand(count, generator=generator, out=real)
    if recipe not in ("none", "flip"):
        torch.randint(2 * vertical + 1, count, generator=generator, out=whole[0])
        torch.randint(2 * horizontal + 1, count, generator=generator, out=whole[1])
    if recipe.startswith("randaugment"):
        for row in (2, 4):
            torch.randint(len(OPERATIONS), count, generator=generator, out=whole[row])
            torch.randint(2, count, generator=generator, out=whole[row + 1])


def bordered(images: Tensor) -> Tensor:
    """Images with the black border that crops reach into."""
    vertical, horizontal = padding(images.shape[1:])
    return functional.pad(images, (horizontal, horizontal, vertical, vertical))


def drawn(
    recipe: str,
    images: Tensor,
    index: Tensor,
    shape: tuple[int, ...],
    whole: Tensor,
    real: Tensor,
) -> Tensor:
    """Some images under a recipe, as `draw` wrote it down, uint8 (B, channels, h, w).

    Args:
        recipe: One that `can_draw` knows.
        images: All of them, `bordered`, (N, channels, ...).
        index: Which, (B,).
        shape: Of each without border.
        whole: (DRAWN, B).
        real: (B,).
    """
    (height, width), full_width = shape[-2:], images.shape[-1]
    rows = whole[0, :, None] + torch.arange(height, device=images.device)
    columns = whole[1, :, None] + torch.arange(width, device=images.device)
    columns = torch.where(real[:, None] < 0.5, full_width - 1 - columns, columns)
    cut = images[index[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    cut = cut.permute(0, 3, 1, 2).contiguous()
    if recipe.startswith("randaugment"):
        for row in (2, 4):
            cut = apply_each(cut, whole[row], whole[row + 1], 9 / LARGEST)
    return cut


AUGMENTATIONS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    recipe.__name__: recipe
    for recipe in (none, flip, crop, crop_flip, randaugment, randaugment_flip, autoaugment)
}

# Those that may turn a picture into its mirror image.
MIRRORING = ("flip", "crop_flip", "randaugment_flip", "autoaugment")


def check_augmentation(recipe: str) -> None:
    """Raise `ValueError` if there is no such recipe."""
    _check_name("augmentation", recipe, AUGMENTATIONS)


def _check_name(what: str, name: str, known: Collection[str]) -> None:
    if name not in known:
        hint = nearest(name, list(known))
        raise ValueError(f"unknown {what} {name!r}{hint} (known: {', '.join(known)})")


def _transforms() -> Any:
    """torchvision's transforms, imported on first use: it takes a second."""
    from fedkd.data.vision import transforms

    return transforms


def _one_by_one(
    images: Tensor, steps: Sequence[Callable[[Tensor], Tensor]], seeds: Sequence[int]
) -> Tensor:
    """Apply `steps` to each image with torch's global CPU generator at its seed.

    The generator is forked once around the loop and seeded directly: `torch.manual_seed` would
    seed every accelerator too, for each image.
    """
    result = torch.empty_like(images)
    with torch.random.fork_rng(devices=[]):
        for row, value in enumerate(seeds):
            torch.default_generator.manual_seed(value)
            image = images[row]
            for step in steps:
                image = step(image)
            result[row] = image
    return result


def padding(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns by which a crop may move: an eighth, 4 of CIFAR's 32 as usual."""
    height, width = shape[-2:]
    return max(1, round(height / 8)), max(1, round(width / 8))


def _check_images(images: Tensor) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise ValueError(
            f"images must be uint8 (N, channels, height, width), got {images.dtype} "
            f"{tuple(images.shape)}"
        )
