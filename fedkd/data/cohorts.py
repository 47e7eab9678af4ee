"""Cohorts: which clients a round asks.

A sampler puts the clients that may be asked in a round in an order; `draw_cohort` takes the first
ones that are there. The draws come from the run's seed, so every machine and every way of running
draws the same cohort of the same clients.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from fedkd.data import SAMPLERS
from fedkd.randomness import stream


@dataclass(frozen=True)
class Turn:
    """What a sampler may look at.

    Attributes:
        clients: How many there may be; they are numbered from 0.
        count: How many of them the round wants.
        round: From 1.
        seed: The run's.
        sizes: Images of each client, where they are known; raises `ValueError` where not.
    """

    clients: int
    count: int
    round: int
    seed: int
    sizes: Callable[[], Sequence[int]]


@dataclass(frozen=True)
class Cohort:
    """Whom a round asks.

    Attributes:
        asked: In the order of the draw.
        wanted: How many of them the round is meant to learn from; others are spares.
        there: Those that could have been asked, in client order.
    """

    asked: tuple[int, ...]
    wanted: int
    there: tuple[int, ...]


@dataclass(frozen=True)
class Sampler:
    """A registered sampler with its options.

    Attributes:
        name: As registered.
        order: Turn -> the clients that may be asked, in the order in which they are.
    """

    name: str
    order: Callable[[Turn], Iterable[int]]

    @classmethod
    def of(cls, name: str, options: Mapping[str, Any]) -> Sampler:
        """With its options checked. Raises `ValueError` for a wrong name or option."""
        return cls(name, partial(SAMPLERS.get(name), **SAMPLERS.check(name, options)))


def draw_cohort(
    sampler: Sampler,
    *,
    clients: int,
    ask: float | str,
    spare: float = 0.0,
    there: Collection[int] | None = None,
    seed: int,
    round_number: int,
    sizes: Callable[[], Sequence[int]],
    elastic: bool = False,
) -> Cohort:
    """Draw the cohort of a round.

    Args:
        sampler: Puts them in order.
        clients: How many there may be.
        ask: `all`, a share (a float up to 1), or a count (an int).
        spare: Share of the wanted clients that is asked beside them.
        there: Clients that can be asked; None: all.
        seed: The run's seed.
        round_number: From 1.
        sizes: Images of each client.
        elastic: Whether a share is one of those that are there, and not of all.

    Raises:
        ValueError: the sampler cannot do with these clients.
    """
    wanted = clients if there is None or not elastic else len(there)
    turn = Turn(clients, how_many(ask, wanted), round_number, seed, sizes)
    order = _order(sampler, turn)
    present = [client for client in order if there is None or client in there]
    wanted = how_many(ask, len(present if elastic else order))
    asked = present[: wanted + round(spare * wanted)]
    return Cohort(tuple(asked), wanted, tuple(sorted(present)))


def most_rounds(sampler: Sampler, *, clients: int, rounds: int, seed: int) -> int:
    """In how many of a run's rounds a client can be asked at most, whoever is there."""
    asked: Counter[int] = Counter()
    for number in range(1, rounds + 1):
        turn = Turn(clients, clients, number, seed, lambda: [1] * clients)
        asked.update(_order(sampler, turn))
    return max(asked.values(), default=0)


def how_many(ask: float | str, total: int) -> int:
    """The count that `all`, a share (float) or a count (int) of `total` clients is."""
    if isinstance(ask, str):
        return total
    return min(total, ask if isinstance(ask, int) else max(1, round(ask * total)))


def _order(sampler: Sampler, turn: Turn) -> list[int]:
    order = list(sampler.order(turn))
    if strange := [client for client in order if not 0 <= client < turn.clients]:
        raise ValueError(
            f"sampler {sampler.name!r} names client {strange[0]}: "
            f"clients are 0 to {turn.clients - 1}"
        )
    return order


@SAMPLERS.register("uniform")
def uniform(turn: Turn) -> Iterable[int]:
    """Every client is as likely as any other."""
    order: list[int] = torch.randperm(turn.clients, generator=_draw(turn)).tolist()
    return order


@SAMPLERS.register("size")
def size(turn: Turn, *, sizes: list[int] | None = None) -> Iterable[int]:
    """Clients with more images are more likely.

    Drawn one after the other, each in proportion to its images, without replacement.

    Args:
        sizes: Images of each client, in order; needed where the clients keep them to themselves.

    References:
        Efraimidis and Spirakis, "Weighted random sampling with a reservoir", IPL 2006
    """
    known = turn.sizes() if sizes is None else sizes
    if len(known) != turn.clients or min(known) < 0:
        raise ValueError(f"sizes: expected {turn.clients} counts of images, got {len(known)}")
    weights = torch.tensor(known, dtype=torch.float64)
    draws = torch.rand(turn.clients, generator=_draw(turn), dtype=torch.float64)
    order: list[int] = (draws.log() / weights).argsort(descending=True, stable=True).tolist()
    return order


@SAMPLERS.register("round_robin")
def round_robin(turn: Turn) -> Iterable[int]:
    """One after the other: the next round goes on where this one ended.

    Exact where everybody is there; one that is away gives its place to the next.
    """
    start = (turn.round - 1) * turn.count % turn.clients
    return (*range(start, turn.clients), *range(start))


@SAMPLERS.register("schedule")
def schedule(turn: Turn, *, cohorts: list[list[int]]) -> Iterable[int]:
    """Fixed cohorts, one a round; after the last comes the first again.

    Args:
        cohorts: The clients of each.
    """
    if not cohorts or any(len(set(cohort)) < max(1, len(cohort)) for cohort in cohorts):
        raise ValueError("cohorts: expected lists of clients, none of them empty or with one twice")
    return cohorts[(turn.round - 1) % len(cohorts)]


@SAMPLERS.register("trace")
def trace(turn: Turn, *, there: dict[int, str]) -> Iterable[int]:
    """Uniform among the clients that are there by a trace of who comes and goes.

    Args:
        there: Client -> the rounds in which it is there, like `"1-3, 7-"`; others always are.
    """
    spans = {client: _spans(client, text) for client, text in there.items()}
    if strange := [client for client in spans if not 0 <= client < turn.clients]:
        raise ValueError(f"there: client {strange[0]}: clients are 0 to {turn.clients - 1}")
    away = {
        client
        for client, rounds in spans.items()
        if not any(turn.round >= low and turn.round <= high for low, high in rounds)
    }
    return [client for client in uniform(turn) if client not in away]


def _spans(client: int, text: str) -> list[tuple[float, float]]:
    found: list[tuple[float, float]] = []
    for part in text.split(",") if text.strip() else []:
        match = re.fullmatch(r"\s*(\d+)\s*(-\s*(\d+)?)?\s*", part)
        if match is None:
            raise ValueError(f"there.{client}: expected rounds like '1-3, 7-', got {text!r}")
        low = int(match[1])
        found.append((low, low if match[2] is None else float(match[3] or "inf")))
    return found


def _draw(turn: Turn) -> torch.Generator:
    return stream(turn.seed, "cohort", turn.round)
