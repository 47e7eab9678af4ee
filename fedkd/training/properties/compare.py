"""Teacher, distilled student and independent students, side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedkd.io.text import nearest
from fedkd.training.properties import PROPERTIES
from fedkd.training.properties.base import Case, Property, Scene, Value
from fedkd.training.properties.readers import NotMeasured, Reader

TAKEN, NOT_TAKEN, AWAY, CHANGED, OPEN = (
    "taken over", "not taken over", "away from the teacher", "changed", "not known",
)  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """One property.

    Attributes:
        teacher: Of the teacher; NaN where it has none or is not there.
        student: Of the distilled student.
        alone: Of the independent student that began like it; chance, where it is the measure.
        control: Of further independent students.
        likeness: Whether more is closer to the teacher.
        count: Images, planes or classes that it is measured on.
        parts: "teacher", "student", "alone" -> what each score is made of.
    """

    teacher: float
    student: float
    alone: float
    control: tuple[float, ...]
    likeness: bool
    count: int
    parts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def difference(self) -> float:
        """Distilled less independent."""
        return self.student - self.alone

    @property
    def spread(self) -> float:
        """The largest difference that another seed alone makes; NaN without a control."""
        known = [abs(each - self.alone) for each in self.control if math.isfinite(each)]
        return max(known) if known else math.nan

    @property
    def verdict(self) -> str:
        """What came of it, in words."""
        return verdict(self.difference, self.spread, self.likeness, self.teacher, self.alone)


def verdict(difference: float, spread: float, likeness: bool, teacher: float, alone: float) -> str:
    """A difference counts only where it is larger than another seed's."""
    if not (math.isfinite(difference) and math.isfinite(spread)):
        return OPEN
    if abs(difference) <= spread:
        return NOT_TAKEN
    if likeness:
        return TAKEN if difference > 0 else AWAY
    if not math.isfinite(teacher):
        return CHANGED
    closer = abs(alone + difference - teacher) < abs(alone - teacher)
    return TAKEN if closer else AWAY


@dataclass(frozen=True)
class Inspection:
    """What was found.

    Attributes:
        properties: Name -> comparison, in the order of measurement.
        left_out: Name -> why it was not measured.
    """

    properties: Mapping[str, Comparison]
    left_out: Mapping[str, str]


def chosen(what: str | Sequence[str]) -> list[str]:
    """Names of properties; "all" and "a,b" are understood. Raises `ValueError`."""
    known = PROPERTIES.names()
    words = what.split(",") if isinstance(what, str) else list(what)
    names = [word.strip() for word in words if word.strip()]
    if not names or names == ["all"]:
        return known
    for name in names:
        if name not in known:
            raise ValueError(
                f"what: there is no property {name!r}{nearest(name, known)} "
                f"(properties: {', '.join(known)})"
            )
    return list(dict.fromkeys(names))


def check_scene(scene: Scene) -> None:
    """Raise `ValueError` for images on which nothing can be compared."""
    if len(scene.images) == 0:
        raise ValueError("images: has no images")
    if len(scene.images.classes) < 2:
        raise ValueError(
            f"images: there is one class ({scene.images.classes[0]}), so all networks agree on "
            "everything"
        )
    if scene.groups is not None and len(scene.groups) != len(scene.images):
        raise ValueError(
            f"groups: expected one for each of {len(scene.images)} images, got {len(scene.groups)}"
        )


def compare(
    case: Case,
    student: Reader,
    alone: Sequence[Reader],
    what: str | Sequence[str] = "all",
    *,
    on_property: Callable[[str], None] = lambda _name: None,
) -> Inspection:
    """Measure properties of a teacher, a distilled student and independent ones.

    Args:
        case: The teacher, and the images.
        student: The distilled one.
        alone: Independent students; the first began like the distilled one, the others are the
            control.
        what: Names of properties; "all" for all.
        on_property: Called before each.

    Raises:
        ValueError: an unknown property, or images on which nothing can be compared.
    """
    check_scene(case.scene)
    found: dict[str, Comparison] = {}
    left_out: dict[str, str] = {}
    for name in chosen(what):
        on_property(name)
        try:
            found[name] = _compared(PROPERTIES.create(name), case, student, alone)
        except NotMeasured as error:
            left_out[name] = str(error)
    return Inspection(found, left_out)


def _compared(
    measure: Property, case: Case, student: Reader, alone: Sequence[Reader]
) -> Comparison:
    distilled = measure.measure(student, case)
    others = [measure.measure(each, case) for each in alone]
    teacher = _of_teacher(measure, case)
    first = others[0].score if others else math.nan
    if not math.isfinite(first) and measure.chance is not None:
        first = measure.chance
    named = {"teacher": teacher, "student": distilled, **({"alone": others[0]} if others else {})}
    return Comparison(
        teacher.score,
        distilled.score,
        first,
        tuple(value.score for value in others[1:]),
        measure.likeness,
        distilled.count,
        {who: value.parts for who, value in named.items() if value.parts},
    )


def _of_teacher(measure: Property, case: Case) -> Value:
    """A property of a network's own can be measured without a teacher; likeness cannot."""
    who = case.gradients if measure.inside and case.gradients is not None else case.teacher
    if who is None:
        return Value(math.nan, 0)
    try:
        return measure.measure(who, case)
    except NotMeasured:
        return Value(math.nan, 0)
