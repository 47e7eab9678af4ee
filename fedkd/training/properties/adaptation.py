"""How good networks are on images of another kind."""

from __future__ import annotations

from fedkd.training.evaluation import accuracy
from fedkd.training.properties import PROPERTIES
from fedkd.training.properties.base import Case, Property, Value, mean
from fedkd.training.properties.domains import on_domain, unseen
from fedkd.training.properties.readers import Reader


@PROPERTIES.register("adaptation")
class Adaptation(Property):
    """Accuracy on inverted, blurred, turned, ... images.

    A teacher that knows a domain may give it to a student that has never seen it.
    """

    title = "Accuracy on unseen domains"
    question = "Is the student better on inverted, blurred, ... images if its teacher is?"
    likeness = False

    def measure(self, who: Reader, case: Case) -> Value:
        """Mean over the domains, and each."""
        scene = case.scene
        parts = {
            name: accuracy(on_domain(who, scene, name), scene.labels) for name in unseen(scene)
        }
        return Value(mean([*parts.values()]), len(scene.images), parts)
