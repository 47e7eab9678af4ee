"""LoRA in federated learning: which means are exact, what travels, what is refused."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from flwr.app import Message
from torch import Tensor

from fedkd.config import ConfigError
from fedkd.models.network import Network
from fedkd.models.peft import low_rank
from fedkd.simulations.baselines import BASELINES
from fedkd.simulations.baselines import low_rank as module
from fedkd.simulations.baselines.traffic import read
from tests.simulations.test_baselines import CLIENTS, LOW_RANK, begun, context, run

R, HIDDEN, INPUTS, CLASSES = 4, 64, 64, 10
# Two hidden layers of the perceptron, each with A and B; the head, whole.
FACTORS = R * (INPUTS + HIDDEN) + R * (HIDDEN + HIDDEN)
ONLY_B = 2 * R * HIDDEN
HEAD = HIDDEN * CLASSES + CLASSES
BASES = INPUTS * HIDDEN + HIDDEN * HIDDEN


def products(network: Network) -> list[Tensor]:
    """What each adapted layer multiplies with: its frozen weights and what is added."""
    return [(pair.base.detach() + pair.delta()).clone() for pair in low_rank(network)]


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Of each round: the weighted mean of what the clients multiply with, and the server's."""
    found: list[tuple[list[Tensor], list[Tensor]]] = []
    average = module.average

    def between(*args: Any, refine: Any = None, travel: Any, **options: Any) -> Any:
        def look(student: Network, replies: Sequence[Message], number: int) -> None:
            # As it was before this round's replies but for the factors: the base of all clients.
            counts = torch.tensor([module._examples(reply) for reply in replies])
            own = {name: p.detach().clone() for name, p in student.named_parameters()}
            each = []
            for reply in replies:
                travel.load(student, read(reply))
                each.append(products(student))
            means = [
                torch.einsum("k,kij->ij", counts / counts.sum(), torch.stack(parts))
                for parts in zip(*each, strict=True)
            ]
            travel.load(student, {name: value.numpy() for name, value in own.items()})
            if refine is not None:
                refine(student, replies, number)
            found.append((means, products(student)))

        return average(*args, refine=look, travel=travel, **options)

    monkeypatch.setattr(module, "average", between)
    return found


@pytest.mark.parametrize("name", LOW_RANK)
def test_two_of_three_means_are_exact(
    name: str, watched: list[tuple[list[Tensor], list[Tensor]]]
) -> None:
    run(name, r=R, alpha=16.0)
    assert len(watched) == 2
    for wanted, got in watched:
        gap = max(float((one - other).abs().max()) for one, other in zip(wanted, got, strict=True))
        assert gap > 1e-4 if name == "fedavg_lora" else gap < 1e-6


@pytest.mark.parametrize(
    ("name", "up", "down"),
    [
        ("fedavg_lora", FACTORS + HEAD, FACTORS + HEAD),
        ("ffa_lora", ONLY_B + HEAD, ONLY_B + HEAD),
        ("fedex_lora", FACTORS + HEAD, FACTORS + HEAD + BASES),
    ],
)
def test_factors_and_head_travel(name: str, up: int, down: int) -> None:
    outcome = run(name, r=R)
    for result in outcome.rounds:
        for sent, numbers in ((result.up, up), (result.down, down)):
            # Each array and message is wrapped by Flower.
            assert 4 * numbers * CLIENTS < sent < (4 * numbers + 9000) * CLIENTS


def test_what_they_cannot_do_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"student\.model\.weights: 'ffa_lora' freezes"):
        BASELINES.create("ffa_lora").run(context(), lambda _: None)
    with pytest.raises(ValueError, match="baseline 'fedex_lora': r: expected a whole number"):
        BASELINES.create("fedex_lora", r=0)
    with pytest.raises(ConfigError, match=r"baseline 'fedavg_lora': .*"):
        run("fedavg_lora", targets="attention")
    student, teachers = begun()
    peft = (student.replace("}", ", peft: head}"), teachers.replace("}", ", peft: head}"))
    with pytest.raises(ConfigError, match=r"student\.model\.peft: 'ffa_lora' brings its own LoRA"):
        run("ffa_lora", *peft)
