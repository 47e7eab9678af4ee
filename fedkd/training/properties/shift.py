"""Whether a shift of a few pixels changes the class."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from fedkd.training.properties import PROPERTIES
from fedkd.training.properties.base import Case, Property, Value
from fedkd.training.properties.readers import Reader

PIXELS = (1, 2, 3, 4)
_WAYS = ((0, 1), (1, 0), (0, -1), (-1, 0))


def shifted(pixels: Tensor, ways: Tensor, distance: int) -> Tensor:
    """Each image moved along one axis, black where nothing is left.

    Args:
        pixels: (N, channels, h, w).
        ways: Which way, 0 to 3, (N,).
        distance: In pixels.
    """
    height, width = pixels.shape[-2:]
    padded = functional.pad(pixels, (distance,) * 4)
    moved = [
        padded[:, :, distance + y * distance :, distance + x * distance :][:, :, :height, :width]
        for y, x in _WAYS
    ]
    return torch.stack(moved)[ways, torch.arange(len(pixels))]


@PROPERTIES.register("shift")
class Shift(Property):
    """Share of images whose class stays the same when they are moved by 1 to 4 pixels."""

    title = "Unmoved by shifts"
    question = "Does the class stay the same when the image is moved by 1 to 4 pixels?"
    likeness = False

    def measure(self, who: Reader, case: Case) -> Value:
        """Mean over the distances, and each."""
        scene, pixels = case.scene, case.scene.pixels
        ways = torch.randint(4, (len(pixels),), generator=scene.stream("shift"))
        return scene.unmoved(
            who,
            "shift",
            {
                f"{distance} px": (distance, partial(shifted, pixels, ways, distance))
                for distance in PIXELS
                if distance < min(pixels.shape[-2:])
            },
        )
