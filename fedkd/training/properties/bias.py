"""Whether the student is good and bad at what the teacher is good and bad at."""

from __future__ import annotations

import torch
from torch import Tensor

from fedkd.training.properties import PROPERTIES
from fedkd.training.properties.base import Case, Property, Scene, Value
from fedkd.training.properties.readers import NotMeasured, Reader


def by_group(who: Reader, scene: Scene) -> Tensor:
    """Accuracy within each group, or class, (G,); NaN where there is no image."""
    right = (scene.clean(who).argmax(dim=1) == scene.labels).double()
    groups, names = group_of(scene)
    hits = torch.zeros(len(names), dtype=torch.double).index_add_(0, groups, right)
    counts = torch.bincount(groups, minlength=len(names)).double()
    return hits / counts.where(counts > 0, torch.nan)


def group_of(scene: Scene) -> tuple[Tensor, tuple[str, ...]]:
    """Group of each image (N,), and their names; classes where no groups were given."""
    if scene.groups is not None:
        return scene.groups, scene.group_names
    return scene.labels, scene.images.classes


@PROPERTIES.register("bias")
class Bias(Property):
    """Correlation, over classes or groups, of the student's accuracies with the teacher's.

    Less the mean of each, so it tells nothing of how good either is.
    """

    title = "Bias per class"
    question = "Is the student weak where the teacher is weak?"
    percent = False

    def measure(self, who: Reader, case: Case) -> Value:
        """With each accuracy; not defined where one of them is everywhere equally good."""
        ours, theirs = (by_group(each, case.scene) for each in (who, case.taught()))
        known = ours.isfinite() & theirs.isfinite()
        if int(known.sum()) < 3:
            raise NotMeasured(
                f"a correlation needs three classes or groups, there are {known.sum()}"
            )
        a, b = (each[known] - each[known].mean() for each in (ours, theirs))
        length = float(a.norm() * b.norm())
        score = float(a @ b) / length if length > 1e-12 else float("nan")
        return Value(score, int(known.sum()), {"accuracies": ours.tolist()})
