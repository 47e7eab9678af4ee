"""Assistants between teachers and student: who teaches, and with what weight."""

import torch

from fedkd.distillation.assistants import with_assistant
from fedkd.knowledge.kinds import Logits
from fedkd.knowledge.payload import Bank, Fused, Knowledge, Role, Teacher, fuse

SURE = torch.eye(3) * 20


def _fused() -> Fused:
    knowledge = [Knowledge(Teacher(n), {Logits(): torch.roll(SURE, n, 0)}) for n in (0, 1)]
    return fuse(Bank.of(knowledge), [lambda e: e.weighted(torch.tensor([[1.0] * 3, [0.0] * 3]))])


def _assistant(number: int) -> Knowledge:
    return Knowledge(Teacher(number, role=Role.ASSISTANT), {Logits(): torch.roll(SURE, 2, 0)})


def test_the_next_network_alone_teaches_but_the_targets_stay() -> None:
    fused = _fused()
    then = with_assistant(fused, _assistant(1), "takd", 1)
    assert [t.key for t in then.bank.teachers] == ["assistant-1"]
    assert then.probabilities.argmax(1).tolist() == [1, 2, 0]
    assert then.targets.tolist() == fused.targets.tolist() == [0, 1, 2]
    ensemble = then.bank.rows(torch.tensor([1]))
    assert ensemble.weights.tolist() == [[1.0]]


def test_densely_guided_every_assistant_counts_as_much_as_all_first_teachers_together() -> None:
    one = with_assistant(_fused(), _assistant(1), "dgkd", 1)
    two = with_assistant(one, _assistant(2), "dgkd", 2)
    assert [t.key for t in two.bank.teachers] == ["0", "1", "assistant-1", "assistant-2"]
    weights = two.bank.rows(torch.arange(3)).weights
    torch.testing.assert_close(weights.sum(0), torch.ones(3))
    torch.testing.assert_close(weights[:, 0], torch.tensor([1 / 3, 0, 1 / 3, 1 / 3]))
    mean = two.bank.rows(torch.arange(3)).mean_probabilities()
    torch.testing.assert_close(two.probabilities, mean, atol=1e-6, rtol=0)
