"""Fusion somewhere else than on the CPU; `meta` stands for every other device."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedkd.fusion import FUSIONS
from fedkd.fusion.base import FitContext, fit_rules
from fedkd.knowledge.kinds import DensityRatio, Logits
from fedkd.knowledge.payload import Bank, Ensemble, Knowledge, Teacher, fuse

TEACHERS, IMAGES, CLASSES = 5, 40, 4


def bank() -> Bank:
    draw = torch.Generator().manual_seed(0)
    answers = torch.randn(TEACHERS, IMAGES, CLASSES, generator=draw).half()
    ratios = torch.rand(TEACHERS, IMAGES, generator=draw)
    return Bank.of(
        [
            Knowledge(
                Teacher(number, 10 + number, (1, 2, 3, 4 + number)),
                {Logits(): answers[number], DensityRatio(): ratios[number]},
            )
            for number in range(TEACHERS)
        ]
    )


@pytest.mark.parametrize("name", FUSIONS.names())
def test_a_fitted_rule_computes_where_the_answers_are(name: str) -> None:
    labels = torch.arange(IMAGES) % CLASSES
    (rule,) = fit_rules([FUSIONS.create(name)], FitContext(bank(), labels=labels))
    where = {"device": "meta"}
    answers = {
        Logits(): torch.empty(TEACHERS, IMAGES, CLASSES, **where),
        DensityRatio(): torch.empty(TEACHERS, IMAGES, **where),
    }
    weights = torch.empty(TEACHERS, IMAGES, **where)
    after = rule(Ensemble(bank().teachers, answers, weights))
    assert after.weights.device.type == "meta"
    assert after.mean_probabilities().shape == (IMAGES, CLASSES)
    assert {tensor.device.type for tensor in after.tensors.values()} == {"meta"}


def test_a_slice_of_a_bank_is_its_rows_and_half_precision_is_read_as_it_is() -> None:
    some, known = slice(7, 19), bank()
    one, other = known.rows(some), known.rows(torch.arange(7, 19))
    assert torch.equal(one.weights, other.weights)
    for kind, tensor in one.tensors.items():
        assert torch.equal(tensor, other.tensors[kind])
        assert tensor.dtype == torch.float32
    expected = np.stack(known.arrays[Logits()])[:, some].astype(np.float32)
    assert np.array_equal(one.logits.numpy(), expected)


def test_fusion_reads_and_writes_on_the_cpu_wherever_it_computes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Blocks of ten images each go to the device, and what comes back is where it was."""
    asked: list[torch.device | str] = []
    rows = Bank.rows

    def watched(self: Bank, index: slice, device: str = "cpu", kinds: object = None) -> Ensemble:
        asked.append((index.stop - index.start, device))
        return rows(self, index, "cpu", kinds)

    monkeypatch.setattr(Bank, "rows", watched)
    monkeypatch.setattr("fedkd.knowledge.payload.FUSION_BUDGET", 4 * TEACHERS * 10 * (CLASSES + 1))
    rules = [FUSIONS.create("class_gated"), FUSIONS.create("entropy")]
    fused = fuse(bank(), rules, device="cuda:1")
    assert asked == [(10, "cuda:1")] * 4
    monkeypatch.undo()
    whole = fuse(bank(), rules)
    assert torch.allclose(fused.probabilities, whole.probabilities)
    assert isinstance(fused.bank.weights, np.ndarray)
    assert fused.bank.class_weights is not None
    assert fused.bank.class_weights.device.type == "cpu"
