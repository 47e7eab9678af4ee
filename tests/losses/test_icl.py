"""Interactive contrastive learning: numbers, and what it is for."""

import math

import numpy as np
import torch

from fedkd.knowledge.kinds import Pooled
from fedkd.losses.base import TeacherWeights
from fedkd.losses.icl import MOST, ICLLoss, icl_loss
from tests.losses.contract import draw


def plain(v: np.ndarray, t: np.ndarray, scale: float) -> np.ndarray:
    """CLIP-KD's two cross entropies, sample by sample."""
    v, t = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (v, t))
    found = []
    for n in range(len(v)):
        rows = np.exp(scale * v[n] @ t.T)
        columns = np.exp(scale * t[n] @ v.T)
        found.append(-(np.log(rows[n] / rows.sum()) + np.log(columns[n] / columns.sum())) / 2)
    return np.array(found)


def test_it_is_the_mean_of_two_cross_entropies() -> None:
    v, t = draw(5, 3), draw(5, 3, seed=1)
    expected = plain(v.numpy(), t.numpy(), 4.0)
    np.testing.assert_allclose(icl_loss(v, t, 4.0).numpy(), expected, rtol=1e-12)
    ones = torch.ones(5, dtype=torch.float64)
    np.testing.assert_allclose(icl_loss(v, t, 4.0, weights=ones).numpy(), expected, rtol=1e-12)


def test_a_sample_without_weight_is_nobodys_rival() -> None:
    v, t = draw(5, 3), draw(5, 3, seed=1)
    weights = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    kept = torch.tensor([0, 1, 3, 4])
    alone = icl_loss(v[kept], t[kept], 4.0) + math.log(5 / 4)  # counts as if the batch were full
    torch.testing.assert_close(icl_loss(v, t, 4.0, weights=weights)[kept], alone)


def test_widths_may_differ_and_the_scale_has_an_end() -> None:
    student, teacher = {Pooled(): draw(6, 4).float()}, {Pooled(): draw(6, 7, seed=1).float()}
    loss = ICLLoss(temperature=0.001).adapted(student, teacher)
    value = loss(student, teacher, None, TeacherWeights(torch.ones(6)))
    projected = loss.projection(student[Pooled()])
    torch.testing.assert_close(value, icl_loss(projected, teacher[Pooled()], MOST))
    assert {name for name, _ in loss.named_parameters()} == {
        "log_scale", "projection.weight", "projection.bias",
    }  # fmt: skip


def test_training_puts_pairs_next_to_each_other() -> None:
    student = {Pooled(): draw(16, 6).float()}
    teacher = {Pooled(): (draw(16, 6) @ draw(6, 9, seed=2)).float()}
    torch.manual_seed(0)
    loss = ICLLoss().adapted(student, teacher)
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.02)
    values = []
    for _ in range(200):
        value = loss(student, teacher, None, TeacherWeights(torch.ones(16))).mean()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(float(value.detach()))
    assert values[-1] < 0.1 * values[0]
