"""How alike class maps are, and whether they name the pixels that matter."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from fedkd.training.properties import PROPERTIES
from fedkd.training.properties.base import Case, Property, Scene, Value
from fedkd.training.properties.localisation import cosines
from fedkd.training.properties.readers import NotMeasured, Reader

SHARES = tuple(step / 10 for step in range(11))


def greyed(pixels: Tensor, maps: Tensor, share: float) -> Tensor:
    """Images whose brightest pixels of the map have the mean colour of all images.

    Args:
        pixels: (N, channels, H, W) in [0, 1].
        maps: (N, h, w), brought to the size of the images.
        share: Of the pixels.
    """
    size = pixels.shape[-2:]
    bright = functional.interpolate(maps[:, None], size, mode="bilinear").flatten(1)
    count = round(share * bright.shape[1])
    order = bright.argsort(dim=1, descending=True, stable=True)[:, :count]
    covered = torch.zeros_like(bright, dtype=torch.bool).scatter_(1, order, True)
    grey = pixels.mean(dim=(0, 2, 3), keepdim=True)
    return torch.where(covered.view(len(pixels), 1, *size), grey, pixels)


def deletion(who: Reader, scene: Scene, maps: Tensor, name: str) -> list[float]:
    """Accuracy after 0, 10, ... 100 % of the pixels, the brightest of its map first."""
    right, pixels = scene.labels, scene.pixels
    curve = []
    for share in SHARES:
        logits = scene.of_view(who, (name, share, who), partial(greyed, pixels, maps, share))
        curve.append(float((logits.argmax(dim=1) == right).double().mean()))
    return curve


def area(curve: list[float]) -> float:
    """Under the curve, from 0 to 100 %."""
    return float(torch.trapezoid(torch.tensor(curve, dtype=torch.double), dx=1 / (len(curve) - 1)))


@PROPERTIES.register("sight")
class Sight(Property):
    """Mean cosine of the class maps of student and teacher; and each one's deletion curve.

    The deletion curve is the accuracy while the pixels that the network's own map shows brightest
    are greyed first. The area under it is small where the map names the pixels that matter; beside
    it stands the area where the map is that of another image, which has spots as large.
    """

    title = "Class maps alike"
    question = "How alike are the class maps of student and teacher on the same image?"
    percent = False
    inside = True

    def measure(self, who: Reader, case: Case) -> Value:
        """With the curve, the areas, and how many images have a map in both."""
        scene = case.scene
        ours = scene.maps(who)
        found = cosines(ours, scene.maps(case.looked_into()))
        found = found[found.isfinite()]
        if not len(found):
            raise NotMeasured("no image has a class map in both student and teacher")
        curve = deletion(who, scene, ours, "greyed")
        order = torch.randperm(len(ours), generator=scene.stream("sight"))
        others = torch.empty_like(ours)
        others[order] = ours[order.roll(1)]
        elsewhere = deletion(who, scene, others, "greyed by another map")
        parts = {"curve": curve, "area": area(curve), "other_area": area(elsewhere)}
        return Value(float(found.mean()), len(found), parts)
