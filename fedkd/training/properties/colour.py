"""Whether other colours change the class."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from fedkd.training.properties import PROPERTIES
from fedkd.training.properties.base import Case, Property, Scene, Value
from fedkd.training.properties.readers import NotMeasured, Reader

STRENGTHS = (0.2, 0.4, 0.6)

# Brightness and the two axes of colour, in which a turn changes the hue and nothing else.
_YIQ = torch.tensor(
    [[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]],
    dtype=torch.float32,
)


def jittered(pixels: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Other brightness, contrast, saturation and hue, drawn for each image.

    The first three are factors from 1 - strength to 1 + strength, the hue turns by at most half the
    strength of a full turn; in this order, where the field's transform draws one.

    Args:
        pixels: (N, 3, h, w) in [0, 1].
        strength: In [0, 1].
        generator: On the CPU.
    """
    drawn = 2 * torch.rand(4, len(pixels), 1, 1, 1, generator=generator) - 1
    bright, contrast, colourful = 1 + strength * drawn[:3]
    images = (pixels * bright).clamp(0, 1)
    level = _grey(images).mean(dim=(1, 2, 3), keepdim=True)
    images = (level + (images - level) * contrast).clamp(0, 1)
    grey = _grey(images)
    images = (grey + (images - grey) * colourful).clamp(0, 1)
    angle = (math.pi * strength * drawn[3]).flatten()
    turn = torch.zeros(len(pixels), 3, 3)
    turn[:, 0, 0] = 1
    turn[:, 1, 1] = turn[:, 2, 2] = angle.cos()
    turn[:, 1, 2], turn[:, 2, 1] = -angle.sin(), angle.sin()
    mixed = torch.linalg.inv(_YIQ) @ turn @ _YIQ
    return torch.einsum("nij,njhw->nihw", mixed, images).clamp(0, 1)


def _grey(images: Tensor) -> Tensor:
    return torch.einsum("c,nchw->nhw", _YIQ[0], images)[:, None]


def _changed(scene: Scene, strength: float) -> Tensor:
    return jittered(scene.pixels, strength, scene.stream("colour", strength))


@PROPERTIES.register("colour")
class Colour(Property):
    """Share of images whose class stays the same under other colours; of colour images only."""

    title = "Unmoved by colours"
    question = "Does the class stay the same under other brightness, contrast, saturation and hue?"
    likeness = False

    def measure(self, who: Reader, case: Case) -> Value:
        """Mean over the strengths, and each."""
        scene, pixels = case.scene, case.scene.pixels
        if pixels.shape[1] != 3:
            raise NotMeasured("the images are grey")
        return scene.unmoved(
            who,
            "colour",
            {f"strength {each}": (each, partial(_changed, scene, each)) for each in STRENGTHS},
        )
