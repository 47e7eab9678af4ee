"""Whether what fools the teacher fools the student."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from fedkd.functional.options import Count
from fedkd.training.properties import PROPERTIES
from fedkd.training.properties.base import Case, Property, Scene, Value
from fedkd.training.properties.readers import BATCH, Reader

# Radius and step of the attack by channels: of digits and other grey images more is needed.
_SIZES = {1: (0.15, 0.03)}
_COLOUR = (8 / 255, 2 / 255)


def attacked(
    who: Reader, pixels: Tensor, labels: Tensor, *, radius: float, step: float, steps: int = 5
) -> Tensor:
    """Images that are wrong for a network, by the signs of its gradients (I-FGSM).

    Args:
        who: Whose gradients are followed.
        pixels: (N, channels, h, w) in [0, 1].
        labels: True classes (N,).
        radius: Largest change of a pixel.
        step: Change in one step.
        steps: How many.

    References:
        Kurakin et al., "Adversarial Examples in the Physical World", 2017,
            https://arxiv.org/abs/1607.02533
    """
    done = []
    rows = torch.arange(len(pixels))
    for own, right, numbers in zip(
        pixels.split(BATCH), labels.split(BATCH), rows.split(BATCH), strict=True
    ):
        changed = own
        for _ in range(steps):
            moved = changed.clone().requires_grad_()
            with torch.enable_grad():
                loss = functional.cross_entropy(who.logits(moved, numbers), right, reduction="sum")
                (slope,) = torch.autograd.grad(loss, [moved])
            changed = changed + step * slope.sign()
            changed = torch.clamp(own + (changed - own).clamp(-radius, radius), 0, 1)
        done.append(changed.detach())
    return torch.cat(done)


@PROPERTIES.register("adversarial")
class Adversarial(Property):
    """Share of the images that fool the teacher on which the student's own class changes too.

    I-FGSM on the teacher, 5 steps: radius 8/255 and step 2/255, of grey images 0.15 and 0.03.
    Counted are images that the teacher had right and, attacked, has wrong. As a control the same
    attack is made on an independent student: there, distilled and independent should be alike.

    Args:
        steps: Of the attack.
    """

    title = "Fooled by the teacher's attack"
    question = "Does an attack made on the teacher, never on the student, fool the student?"
    inside = True

    def __init__(self, *, steps: Count = 5) -> None:
        self.steps = steps

    def measure(self, who: Reader, case: Case) -> Value:
        """Not defined where the attack fools the teacher on no image."""
        found = self._fooled(who, case.looked_into(), case.scene)
        if case.unrelated is None or case.unrelated is who:
            return found
        control = self._fooled(who, case.unrelated, case.scene)
        return Value(found.score, found.count, {"unrelated": control.score})

    def _fooled(self, who: Reader, victim: Reader, scene: Scene) -> Value:
        radius, step = _SIZES.get(scene.images.shape[0], _COLOUR)
        labels, pixels = scene.labels, scene.pixels

        def make() -> Tensor:
            options = {"radius": radius, "step": step, "steps": self.steps}
            return attacked(victim, pixels, labels, **options)  # type: ignore[arg-type]

        images = scene.kept((victim, "attacked", self.steps), make)
        view = ("attacked", self.steps, victim)
        before = scene.clean(victim).argmax(1) == labels
        after = scene.of_view(victim, view, lambda: images).argmax(1) == labels
        counted = before & ~after
        if not counted.any():
            return Value(float("nan"), 0)
        ours = scene.of_view(who, view, lambda: images)
        changed = ours.argmax(1) != scene.clean(who).argmax(1)
        return Value(float(changed[counted].double().mean()), int(counted.sum()))
