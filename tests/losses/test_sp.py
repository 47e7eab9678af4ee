"""Similarity-preserving distillation against the formula in NumPy."""

import numpy as np
import pytest
import torch

from fedkd.losses.sp import sp_loss
from tests.losses.contract import draw


def _draw(size=6, width=5):
    return draw(2, size, width).unbind()


def test_by_hand():
    # Rows of the Gram matrices: (1, 0), (0, 4) and (1, 1), (1, 1), each made of length one.
    student, teacher = torch.tensor([[1.0, 0], [0, 2]]), torch.tensor([[3.0], [3.0]])
    root = 0.5**0.5
    assert sp_loss(student, teacher).item() == pytest.approx((2 * (1 - root) ** 2 + 2 * 0.5) / 4)


def test_sp_is_the_published_formula():
    student, teacher = _draw()
    s, t = (z.numpy() @ z.numpy().T for z in (student, teacher))
    s, t = (g / np.linalg.norm(g, axis=1, keepdims=True) for g in (s, t))
    expected = ((s - t) ** 2).sum() / 36
    assert sp_loss(student, teacher).item() == pytest.approx(expected, rel=1e-12)


def test_neither_scale_nor_rotation_is_seen():
    student, _ = _draw()
    rotation = torch.linalg.qr(_draw(5, 5)[0]).Q
    assert sp_loss(3 * student @ rotation, student) < 1e-12
