"""Banks, fusion over a whole bank, and knowledge on disk."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fedkd.fusion import FUSIONS
from fedkd.knowledge import payload as payload_module
from fedkd.knowledge.kinds import Logits, VirtualLogits
from fedkd.knowledge.payload import Bank, Ensemble, Knowledge, Teacher, fuse
from fedkd.knowledge.store import KnowledgeStore

KINDS = (Logits(), VirtualLogits(0))


def knowledge(client: int, samples: int = 10, classes: int = 3) -> Knowledge:
    generator = torch.Generator().manual_seed(client)
    tensors = {k: torch.randn(samples, classes, generator=generator).half() for k in KINDS}
    return Knowledge(Teacher(client, 5 + client, (client + 1, 2, 0)), tensors)


def test_order_of_arrival_does_not_matter(tmp_path: Path) -> None:
    one, two = KnowledgeStore(tmp_path / "1"), KnowledgeStore(tmp_path / "2")
    for client in (0, 1, 2):
        one.put(knowledge(client))
    for client in (2, 0, 1):
        two.put(knowledge(client))
    rules = [FUSIONS.create("class_gated"), FUSIONS.create("entropy")]
    first, second = (fuse(store.bank(KINDS), rules) for store in (one, two))
    assert torch.equal(first.probabilities, second.probabilities)
    assert np.array_equal(first.bank.weights, second.bank.weights)


def test_disk_and_memory_say_the_same(tmp_path: Path) -> None:
    items = [knowledge(client) for client in range(4)]
    store = KnowledgeStore(tmp_path)
    for item in items:
        store.put(item)
    rules = [FUSIONS.create("class_gated")]
    on_disk = fuse(store.bank(KINDS), rules, store=store.allocate)
    in_memory = fuse(Bank.of(items), rules)
    assert torch.equal(on_disk.probabilities, in_memory.probabilities)
    rows = torch.tensor([3, 1])
    for kind in KINDS:
        left, right = (fused.bank.rows(rows).tensors[kind] for fused in (on_disk, in_memory))
        assert torch.equal(left, right)


def test_grouping_of_samples_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    bank = Bank.of([knowledge(client) for client in range(3)])
    rules = [FUSIONS.create("class_gated"), FUSIONS.create("entropy")]
    whole = fuse(bank, rules)
    monkeypatch.setattr(payload_module, "FUSION_BUDGET", 1)  # one sample at a time
    single = fuse(bank, rules)
    assert torch.allclose(whole.probabilities, single.probabilities, atol=1e-6)
    assert torch.equal(whole.targets, single.targets)


def test_a_client_is_kept_once_and_half_written_ones_are_swept(tmp_path: Path) -> None:
    store = KnowledgeStore(tmp_path)
    store.put(knowledge(1))
    before = store.bank(KINDS).rows(torch.arange(10)).tensors[Logits()]
    other = Knowledge(Teacher(1, 1, (1, 1, 1)), {k: torch.zeros(10, 3).half() for k in KINDS})
    store.put(other)
    assert torch.equal(store.bank(KINDS).rows(torch.arange(10)).tensors[Logits()], before)
    (tmp_path / ".client-0002").mkdir()
    assert KnowledgeStore(tmp_path).clients() == [1]
    assert not (tmp_path / ".client-0002").exists()


def test_true_labels_win_over_pseudo_labels() -> None:
    bank = Bank.of([knowledge(0)])
    labels = torch.arange(10) % 3
    assert torch.equal(fuse(bank, [], labels=labels).targets, labels)
    guessed = fuse(bank, [])
    assert torch.equal(guessed.targets, guessed.probabilities.argmax(1))


def test_a_rule_may_merge_teachers(tmp_path: Path) -> None:
    def first_only(ensemble: Ensemble) -> Ensemble:
        return Ensemble(
            ensemble.teachers[:1],
            {kind: tensor[:1].clone() for kind, tensor in ensemble.tensors.items()},
            torch.ones(1, ensemble.num_samples),
        )

    bank = Bank.of([knowledge(client) for client in range(3)])
    merged = fuse(bank, [first_only]).bank
    assert len(merged.teachers) == 1
    expected = knowledge(0).tensors[Logits()].float()
    assert torch.equal(merged.rows(torch.arange(10)).tensors[Logits()][0], expected)


def test_unequal_kinds_and_nobody_are_named() -> None:
    odd = Knowledge(Teacher(7), {Logits(): torch.zeros(10, 3)})
    with pytest.raises(ValueError, match="client 7 shares \\['logits'\\]"):
        Bank.of([knowledge(0), odd])
    with pytest.raises(ValueError, match="no teacher"):
        Bank.of([])
