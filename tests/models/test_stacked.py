"""A stack of networks reads what each of them reads."""

from __future__ import annotations

import copy
import logging
import weakref

import pytest
import torch
from torch.nn import functional

import fedkd
from fedkd.data.images import ImageSet
from fedkd.models.stacked import Stack, Unstackable, architecture, in_stacks, write_state

COUNTS = (6, 4)


def _images() -> ImageSet:
    return fedkd.load_dataset("synthetic", classes=3, size=16, per_class=4)[0].subset(
        torch.arange(12)
    )


@pytest.mark.parametrize("model", ["resnet8", "mobilenetv2", "shufflenetv2"])
def test_gradients_and_running_statistics_of_filled_up_batches(model: str) -> None:
    images = _images()
    networks = [fedkd.network(model, images, seed=seed).double().train() for seed in (0, 1)]
    pixels, labels = images.images.unflatten(0, (2, 6)), images.labels.unflatten(0, (2, 6))
    for counts in (None, torch.tensor(COUNTS)):
        stack = Stack(networks, training=True)
        logits = stack.read(pixels, counts=counts)
        there = (6, 6) if counts is None else COUNTS
        losses = [functional.cross_entropy(o[:n], y[:n]) for o, y, n in zip(logits, labels, there)]
        gradients = stack.gradients(sum(losses))
        for number, network in enumerate(networks):
            alone, count = copy.deepcopy(network), there[number]
            output = alone(pixels[number, :count])
            assert torch.allclose(output, logits[number, :count], rtol=1e-6)
            functional.cross_entropy(output, labels[number, :count]).backward()
            wanted = torch.cat([p.grad.flatten() for p in alone.parameters()])
            assert (gradients[number] - wanted).norm() < 1e-9 * wanted.norm()
            row = stack.row(number)
            for name, buffer in alone.named_buffers():
                assert torch.allclose(row[name], buffer, rtol=1e-9, atol=1e-12), name


def test_a_row_is_given_back() -> None:
    networks = [fedkd.network("resnet8", _images(), seed=seed) for seed in range(3)]
    stack = Stack(networks, training=False).take(torch.tensor([2, 1]))
    write_state(networks[0], stack.row(0))
    for one, other in zip(networks[0].state_dict().values(), networks[2].state_dict().values()):
        assert torch.equal(one, other)


def test_other_options_are_another_architecture() -> None:
    batch, group, same = (
        fedkd.network("cnn_tiny", _images(), seed=seed, norm=norm)
        for seed, norm in enumerate(("batch", "group", "batch"))
    )
    assert architecture(batch) == architecture(same) != architecture(group)
    assert architecture(batch) != architecture(copy.deepcopy(batch).double())


def test_what_did_not_fit_is_let_go_before_halves_are_tried() -> None:
    class Memory:
        pass

    networks, held, sizes = [fedkd.network("mlp", _images())] * 7, [], []

    def together(group: list[int]) -> list[str]:
        assert all(memory() is None for memory in held)
        sizes.append(len(group))
        memory = Memory()
        held.append(weakref.ref(memory))
        if len(group) > 2:
            raise torch.OutOfMemoryError
        return [f"{number} of {len(group)}" for number in group]

    keys = ["a", "b", "a", None, "a", "a", "a"]
    found = in_stacks(networks, keys, together, lambda number: f"{number} alone")
    pairs = ["0 of 2", "1 alone", "2 of 2", "3 alone", "4 alone", "5 of 2", "6 of 2"]
    assert (found, sizes) == (pairs, [5, 3, 2, 2])


def test_each_reason_against_a_stack_is_announced_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedkd.models.stacked._announced", set())
    networks = [fedkd.network("mlp", _images())] * 4

    def together(group: list[int]) -> list[int]:
        raise (Unstackable if 0 in group else RuntimeError)(f"because of {group[0]}")

    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert in_stacks(networks, list("abab"), together, abs) == [0, 1, 2, 3]
    assert [caplog.text.count(f"because of {number}") for number in (0, 1)] == [1, 1]
