"""How far confidence can be believed."""

from __future__ import annotations

from fedkd.training.evaluation import calibration
from fedkd.training.properties import PROPERTIES
from fedkd.training.properties.base import Case, Property, Value
from fedkd.training.properties.readers import Reader


@PROPERTIES.register("calibration")
class Calibration(Property):
    """Expected calibration error in 15 bins: how far confidence and accuracy are apart."""

    title = "Calibration error"
    question = "How far are confidence and accuracy apart?"
    likeness = False

    def measure(self, who: Reader, case: Case) -> Value:
        """Of the images as they are."""
        found = calibration(case.scene.clean(who), case.scene.labels)
        return Value(found.ece, sum(found.counts))
