"""How alike the features are."""

from __future__ import annotations

from fedkd.functional.similarity import unbiased_cka
from fedkd.training.properties import PROPERTIES
from fedkd.training.properties.base import Case, Property, Value
from fedkd.training.properties.readers import NotMeasured, Reader

# Images whose kernels are held at once.
_MOST = 2000


@PROPERTIES.register("representation")
class Representation(Property):
    """Unbiased CKA of what enters the classifiers of student and teacher."""

    title = "Representation (CKA)"
    question = "Do features place the same images beside each other?"
    percent = False

    def measure(self, who: Reader, case: Case) -> Value:
        """Of at most 2,000 images."""
        scene, teacher = case.scene, case.taught()
        if len(scene.images) < 4:
            raise NotMeasured(f"CKA needs four images, there are {len(scene.images)}")
        ours, theirs = (scene.pooled(each)[:_MOST].double() for each in (who, teacher))
        return Value(float(unbiased_cka(ours, theirs)), len(ours))
