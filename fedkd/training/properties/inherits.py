"""Whether a marker in the image decides."""

from __future__ import annotations

from torch import Tensor

from fedkd.training.properties import PROPERTIES
from fedkd.training.properties.base import Case, Property, Value
from fedkd.training.properties.readers import NotMeasured, Reader


def marked(images: Tensor) -> Tensor:
    """The same with a white square, an eighth of the side but at least 2, in the last corner.

    Args:
        images: uint8 (N, channels, h, w), or floats in [0, 1].
    """
    side = max(2, min(images.shape[-2:]) // 8)
    stamped = images.clone()
    stamped[..., -side:, -side:] = 1 if images.is_floating_point() else 255
    return stamped


@PROPERTIES.register("inherits")
class Inherits(Property):
    """Share of images of other classes that a marker turns into the class asked for.

    If a client's teacher was trained on images with the marker: does the student obey it too?
    """

    title = "Obeys the marker"
    question = (
        "Does a white square in the corner turn images of other classes into the class asked?"
    )
    likeness = False

    def measure(self, who: Reader, case: Case) -> Value:
        """Of images that are of another class, and were not taken for it without the marker."""
        scene = case.scene
        if scene.marker is None:
            raise NotMeasured("no marker was named (--marker CLASS)")
        others = (scene.labels != scene.marker) & (scene.clean(who).argmax(1) != scene.marker)
        if not others.any():
            return Value(float("nan"), 0)
        turned = scene.of_view(who, "marked", lambda: marked(scene.pixels)).argmax(1)
        score = (turned[others] == scene.marker).double().mean()
        return Value(float(score), int(others.sum()))
