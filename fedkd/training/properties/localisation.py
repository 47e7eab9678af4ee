"""Where networks look."""

from __future__ import annotations

import torch
from torch import Tensor

from fedkd.training.properties import PROPERTIES
from fedkd.training.properties.base import Case, Property, Value
from fedkd.training.properties.readers import Reader, resized, unit


def cosines(first: Tensor, second: Tensor) -> Tensor:
    """Of maps averaged to the smaller of both, (N, h, w) x (N, H, W) -> (N,); NaN of an empty one.

    Args:
        first: Not negative.
        second: Likewise.
    """
    side = min(first.shape[1], second.shape[1])
    ours, theirs = resized(first, side).double(), resized(second, side).double()
    there = (ours.flatten(1).sum(1) > 0) & (theirs.flatten(1).sum(1) > 0)
    found = (unit(ours) * unit(theirs)).flatten(1).sum(dim=1)
    return torch.where(there, found, torch.nan)


@PROPERTIES.register("localisation")
class Localisation(Property):
    """Share of images on which the class map is more like the teacher's than the reference's is.

    Grad-CAM of the true class at the last map. The reference is the independent student that began
    with the same weights; images with an empty map, or with equal ones, do not count.
    """

    title = "Localisation"
    question = "Is the student's class map closer to the teacher's than an independent student's?"
    chance = 0.5
    inside = True

    def measure(self, who: Reader, case: Case) -> Value:
        """Not defined of the reference itself."""
        scene, theirs = case.scene, case.scene.maps(case.looked_into())
        ours = cosines(scene.maps(who), theirs)
        if case.reference is None:
            return Value(float("nan"), 0)
        beside = cosines(scene.maps(case.reference), theirs)
        gap = ours - beside
        counted = gap.isfinite() & (gap.abs() > 1e-9)
        score = float((gap[counted] > 0).double().mean()) if counted.any() else float("nan")
        left_out = {"empty": int(gap.isnan().sum()), "equal": int((gap.abs() <= 1e-9).sum())}
        return Value(score, int(counted.sum()), left_out)
