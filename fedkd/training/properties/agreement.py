"""Whether both name the same class."""

from __future__ import annotations

from fedkd.training.properties import PROPERTIES
from fedkd.training.properties.base import Case, Property, Value, same
from fedkd.training.properties.readers import Reader


@PROPERTIES.register("agreement")
class Agreement(Property):
    """Share of images on which student and teacher name the same class."""

    title = "Agreement"
    question = "Do student and teacher name the same class, right or wrong?"

    def measure(self, who: Reader, case: Case) -> Value:
        """Of the images as they are."""
        scene = case.scene
        return Value(same(scene.clean(who), scene.clean(case.taught())), len(scene.images))
