"""Where networks draw the line between classes."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fedkd.training.properties import PROPERTIES
from fedkd.training.properties.base import Case, Property, Scene, Value
from fedkd.training.properties.readers import NotMeasured, Reader

SIDE, LOW, HIGH = 25, -0.5, 1.5


def triplets(count: int, total: int, generator: torch.Generator) -> Tensor:
    """Numbers of three different images for each plane, (count, 3)."""
    weights = torch.ones(count, total)
    return torch.multinomial(weights, 3, generator=generator)


def plane(corners: Tensor) -> Tensor:
    """The plane through three images as a 25 x 25 grid, (3, channels, h, w) -> (625, ...).

    The images lie at (0, 0), (1, 0) and (0, 1); the grid goes from -0.5 to 1.5, and what leaves
    [0, 1] is clipped: that is no image.
    """
    ticks = torch.linspace(LOW, HIGH, SIDE)
    a, b = (t.reshape(-1, 1, 1, 1) for t in torch.meshgrid(ticks, ticks, indexing="ij"))
    first, second, third = corners
    return (first + a * (second - first) + b * (third - first)).clamp(0, 1)


def overlap(ours: Tensor, theirs: Tensor) -> float:
    """Mean over the classes that occur of |A and B| / |A or B|, (P,) x (P,) classes."""
    found = []
    for name in torch.cat([ours, theirs]).unique():
        a, b = ours == name, theirs == name
        found.append(float((a & b).sum()) / float((a | b).sum()))
    return sum(found) / len(found)


@PROPERTIES.register("boundary")
class Boundary(Property):
    """Mean IoU of the classes' regions on planes through three random images."""

    title = "Decision boundaries (IoU)"
    question = "On planes through three images: how far do regions of a class coincide?"
    percent = False

    def measure(self, who: Reader, case: Case) -> Value:
        """Mean over the planes, with its standard error."""
        scene, teacher = case.scene, case.taught()
        if len(scene.images) < 3:
            raise NotMeasured(f"a plane needs three images, there are {len(scene.images)}")
        ours, theirs = (_regions(each, scene) for each in (who, teacher))
        found = torch.tensor([overlap(*pair) for pair in zip(ours, theirs, strict=True)])
        error = float(found.std() / math.sqrt(len(found))) if len(found) > 1 else float("nan")
        return Value(float(found.mean()), len(found), {"error": error})


def _regions(who: Reader, scene: Scene) -> Tensor:
    """Class of each point of each plane, (planes, 625)."""
    drawn = triplets(scene.triplets, len(scene.images), scene.stream("boundary"))
    images = scene.images.images.cpu()

    def parts() -> Iterator[Tensor]:
        return (plane(images[three].float().div(255)) for three in drawn)

    rows = drawn.repeat_interleave(SIDE * SIDE, dim=0)
    return scene.logits(who, "planes", parts, rows).argmax(dim=1).view(len(drawn), -1)
