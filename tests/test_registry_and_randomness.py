"""Names and random streams."""

import random

import numpy as np
import pytest
import torch

from fedkd.randomness import seeded, stream, stream_seed
from fedkd.registry import Registry


class Thing:
    def __init__(self, *, size: int, ratio: float = 0.5) -> None:
        self.size, self.ratio = size, ratio


@pytest.fixture
def things() -> Registry[Thing]:
    registry: Registry[Thing] = Registry("thing", "fedkd.fusion")
    registry.register("thing")(Thing)
    return registry


def test_options_are_converted_and_checked(things: Registry[Thing]) -> None:
    assert things.create("thing", size="3").size == 3
    with pytest.raises(
        ValueError, match=r"thing 'thing' has no option 'siez'; did you mean 'size'"
    ):
        things.create("thing", siez=3)
    with pytest.raises(ValueError, match="thing 'thing' needs option 'size'"):
        things.create("thing")
    with pytest.raises(ValueError, match="unknown thing 'thign'; did you mean 'thing'"):
        things.create("thign")


def test_a_taken_name_is_refused(things: Registry[Thing]) -> None:
    with pytest.raises(ValueError, match="is already"):
        things.register("thing")(Registry)


def test_streams_differ_by_name_and_repeat_by_seed() -> None:
    draws = {
        names: torch.rand(4, generator=stream(*names)).tolist()
        for names in [(0, "a"), (0, "b"), (1, "a"), (0, "a", 1)]
    }
    assert len({tuple(d) for d in draws.values()}) == 4
    assert torch.rand(4, generator=stream(0, "a")).tolist() == draws[0, "a"]
    assert stream_seed(0, "a") == 7606779636460171844  # the same on every machine, for ever


def test_seeded_restores_the_global_generators() -> None:
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    expected = torch.rand(1), random.random(), np.random.rand()
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    with seeded(0, "x"):
        first = torch.rand(2)
        random.random(), np.random.rand()
    assert (torch.rand(1), random.random(), np.random.rand()) == expected
    with seeded(0, "x"):
        assert torch.equal(torch.rand(2), first)
