"""Numbers that published code gave, with their inputs: one JSON file a family of losses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor


class Published(dict[str, Any]):
    """Inputs under "inputs", what came out under other names."""

    def double(self, name: str) -> Tensor:
        """An input in double precision."""
        return torch.tensor(self["inputs"][name], dtype=torch.float64)

    def answers(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        """Logits of the student and of three teachers."""
        names = ("logits_s", "logits_t", "logits_t2", "logits_t3")
        student, *teachers = (self.double(name).to(dtype) for name in names)
        return student.requires_grad_(), torch.stack(teachers)


def published(family: str) -> Published:
    """The file of a family."""
    text = Path(__file__).with_name(f"{family}.json").read_text(encoding="utf-8")
    return Published(json.loads(text))


def repeats(
    case: Any,
    value: Tensor,
    tensor: Tensor,
    rel: float = 1e-10,
    rtol: float = 1e-8,
    atol: float = 1e-14,
) -> None:
    """Value and gradient are those that a case of published code has."""
    (gradient,) = torch.autograd.grad(value, tensor)
    assert value.item() == pytest.approx(case["value"], rel=rel)
    expected = torch.tensor(case["grad"], dtype=tensor.dtype)
    torch.testing.assert_close(gradient, expected, rtol=rtol, atol=atol)
