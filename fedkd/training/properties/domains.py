"""Whether both say the same about images of another kind."""

from __future__ import annotations

from torch import Tensor

from fedkd.data import SHIFTS
from fedkd.data.domains import shifted
from fedkd.training.properties import PROPERTIES
from fedkd.training.properties.base import Case, Property, Scene, Value, mean, same
from fedkd.training.properties.readers import Reader


def unseen(scene: Scene) -> list[str]:
    """Names of the shifts that leave these images their channels."""
    coloured = scene.images.shape[0] == 3
    return [name for name in SHIFTS.names() if name != "plain" and (coloured or name != "colour")]


def on_domain(who: Reader, scene: Scene, name: str) -> Tensor:
    """Logits of the images, all shifted alike, (N, C)."""
    return scene.of_view(who, ("domain", name), lambda: shifted(scene.images, name).images.cpu())


@PROPERTIES.register("domains")
class Domains(Property):
    """Share of inverted, blurred, turned, ... images on which both name the same class."""

    title = "Agreement on unseen domains"
    question = "Do both name the same class, right or wrong, on inverted, blurred, ... images?"

    def measure(self, who: Reader, case: Case) -> Value:
        """Mean over the domains, and each."""
        scene, teacher = case.scene, case.taught()
        parts = {
            name: same(on_domain(who, scene, name), on_domain(teacher, scene, name))
            for name in unseen(scene)
        }
        return Value(mean([*parts.values()]), len(scene.images), parts)
