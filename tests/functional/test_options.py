"""Options read from signatures: ranges in types, those of a formula taken by a class."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from fedkd.functional.options import Count, Minority, Part, Positive, options_checked, options_of
from fedkd.losses.base import DistillationLoss, TeacherWeights, Tensors
from fedkd.losses.inputs import loss_function


@options_checked("thing")
def _thing(
    *,
    data: Tensor | None = None,
    size: Count = 1,
    scale: Positive | None = None,
    share: Minority = 0.1,
    part: Part = 1.0,
    how: bool | Literal["auto"] = "auto",
) -> None:
    """Nothing."""


def test_options_are_keywords_without_tensors() -> None:
    assert list(options_of(_thing)) == ["size", "scale", "share", "part", "how"]


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("size", 0, "at least 1"), ("size", 1.5, "a whole number"), ("size", True, "a whole"),
        ("scale", 0.0, "positive"), ("scale", math.inf, "finite"), ("scale", "2", "a number"),
        ("share", 0.5, r"in \[0, 0.5\)"), ("part", 0, r"in \(0, 1\]"), ("how", 1, "one of 'auto'"),
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_refused(option: str, value: Any, expected: str) -> None:
    with pytest.raises(ValueError, match=f"thing: {option} must be {expected}.*, got"):
        _thing(**{option: value})


def test_values_in_range_pass() -> None:
    _thing(size=torch.iinfo(torch.int64).max, scale=None, share=0, part=1, how=False)
    _thing(data=torch.ones(1), scale=3, how="auto")


def test_an_unknown_option_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(TypeError, match="thing has no option 'scael'; did you mean 'scale'"):
        _thing(scael=1.0)  # type: ignore[call-arg]


@loss_function("mine")
def _mine(student: Tensor, *, weights: Tensor | None = None, power: Positive) -> Tensor:
    return student.sum(dim=1) ** power


class MineLoss(DistillationLoss, formula=_mine):
    """A loss with an option that must be given, and one that the formula does not have."""

    def __init__(self, *, repeats: Count = 2, **formula: Any) -> None:
        super().__init__(**formula)
        self.repeats = repeats

    def forward(
        self, student: Tensors, teacher: Tensors, targets: Tensor | None, weights: TeacherWeights
    ) -> Tensor:
        """Nothing of interest."""
        return self.repeats * _mine(next(iter(student.values())), **vars(self.options))


def test_a_class_takes_the_options_of_its_formula_beside_its_own() -> None:
    assert list(inspect.signature(MineLoss).parameters) == ["power", "repeats"]
    loss = MineLoss(power=2.0, repeats=3)
    assert vars(loss.options) == {"power": 2.0}
    assert loss.repeats == 3
    for again in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert again.options == loss.options
    for wrong, error, message in [
        ({}, TypeError, "'power'"),
        ({"power": 0.0}, ValueError, "MineLoss: power must be positive, got 0.0"),
        ({"power": 1.0, "repeats": 0}, ValueError, "repeats must be at least 1"),
        ({"power": 1.0, "repeat": 1}, TypeError, "no option 'repeat'; did you mean 'repeats'"),
    ]:
        with pytest.raises(error, match=message):
            MineLoss(**wrong)
