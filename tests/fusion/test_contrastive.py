"""CreamFL's weights: numbers, blocks, and what they are for."""

import pytest
import torch

from fedkd.fusion import contrastive
from fedkd.fusion.base import FitContext, fit_rules
from fedkd.fusion.contrastive import Contrastive, contrast
from fedkd.knowledge.kinds import Logits
from fedkd.knowledge.payload import Bank, Ensemble, Teacher


def ensemble(logits: torch.Tensor) -> Ensemble:
    count, samples, _ = logits.shape
    who = tuple(Teacher(number) for number in range(count))
    return Ensemble(who, {Logits(): logits}, torch.full((count, samples), 1 / count))


def weights(item: Ensemble, rule: Contrastive | None = None) -> torch.Tensor:
    bank = Bank(item.teachers, {Logits(): list(item.logits.numpy())})
    (ready,) = fit_rules([rule or Contrastive()], FitContext(bank))
    return ready(item).weights


def test_weights_are_those_of_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    item = ensemble(2 * torch.randn(3, 11, 4, generator=generator))
    v = torch.log_softmax(item.logits, -1)
    v = v - v.mean(-1, keepdim=True)
    v = v / v.norm(dim=-1, keepdim=True)
    g = v.mean(0)
    similar = torch.einsum("knc,mc->knm", v, g) / 0.1  # all of it, as nobody else builds it
    expected = torch.softmax(torch.log_softmax(similar, -1).diagonal(dim1=1, dim2=2), 0)
    torch.testing.assert_close(weights(item), expected)
    monkeypatch.setattr(contrastive, "_BLOCK", 1)
    torch.testing.assert_close(weights(item), expected)


def test_no_block_is_larger_than_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    real = torch.logsumexp
    monkeypatch.setattr(torch, "logsumexp", lambda x, dim: sizes.append(x.numel()) or real(x, dim))
    monkeypatch.setattr(contrastive, "_BLOCK", 5000)
    contrast(torch.randn(4, 900, 3), torch.randn(900, 3), torch.randn(1000, 3), 0.1)
    assert max(sizes) <= 5000


def test_who_takes_samples_for_others_has_no_say() -> None:
    classes = torch.arange(40) % 4
    right = 5 * torch.eye(4)[classes]
    item = ensemble(torch.stack([right, right, 5 * torch.eye(4)[(classes + 1) % 4]]))
    found = weights(item)
    assert (found[2] < 0.01).all()
    torch.testing.assert_close(found[0], found[1])
    flat = weights(item, Contrastive(temperature=1e3))
    assert (flat - 1 / 3).abs().max() < 0.01
