"""Whether another cut of an image changes the class."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from fedkd.functional.options import Share
from fedkd.training.properties import PROPERTIES
from fedkd.training.properties.base import Case, Property, Scene, Value, same
from fedkd.training.properties.readers import NotMeasured, Reader


def cropped(pixels: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """A square cut out of each image at a random place, brought back to its size."""
    height, width = pixels.shape[-2:]
    count = (len(pixels),)
    top = torch.randint(height - side + 1, count, generator=generator)
    left = torch.randint(width - side + 1, count, generator=generator)
    windows = pixels.unfold(2, side, 1).unfold(3, side, 1)
    cut = windows[torch.arange(len(pixels)), :, top, left]
    back = functional.interpolate(cut, (height, width), mode="bilinear", antialias=True)
    return back.clamp(0, 1)


def _cut(scene: Scene, side: int, number: int) -> Tensor:
    return cropped(scene.pixels, side, scene.stream("crop", number))


@PROPERTIES.register("crop")
class Crop(Property):
    """Share of images of which two cuts of equal size are of the same class.

    Args:
        scale: Side of a cut, as a share of the image's.
    """

    title = "Unmoved by crops"
    question = "Are two cuts of equal size out of one image of the same class?"
    likeness = False

    def __init__(self, *, scale: Share = 0.75) -> None:
        self.scale = scale

    def measure(self, who: Reader, case: Case) -> Value:
        """Raises `NotMeasured` where the images are too small to be cut in two ways."""
        scene, pixels = case.scene, case.scene.pixels
        side = round(self.scale * min(pixels.shape[-2:]))
        if not 1 < side < min(pixels.shape[-2:]):
            raise NotMeasured(f"images of {pixels.shape[-1]} pixels are too small for a crop")
        first, second = (
            scene.of_view(
                who,
                ("crop", self.scale, number),
                partial(_cut, scene, side, number),
            )
            for number in range(2)
        )
        return Value(same(first, second), len(pixels))
