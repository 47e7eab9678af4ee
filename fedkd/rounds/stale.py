"""Knowledge that ages: clients' answers of earlier rounds, where they still count.

A client that was away counts by its last answers, if they are at most `federation.stale.keep`
rounds old; one in quarantine does not. An answer about an image loses weight with its own age:
where a round asks about a part of the images (`federation.subset`), those about the others are
older than the reply they came with.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from fedkd.config import Federation
from fedkd.io.records import Damaged
from fedkd.knowledge.kinds import Kind
from fedkd.knowledge.payload import Bank
from fedkd.knowledge.query import Images
from fedkd.rounds.context import ExperimentContext
from fedkd.runs.directory import RunDirectory
from fedkd.runs.quarantine import quarantined

logger = logging.getLogger(__name__)

Sources = Mapping[int, int]
"""Client -> the round whose answers count for it."""


def sources(run: RunDirectory, round_number: int, federation: Federation) -> dict[int, int]:
    """Who counts in a round: those who answered in it, and those whose answers are not too old."""
    found = dict.fromkeys(run.knowledge(round_number).clients(), round_number)
    keep = federation.stale.keep
    out = quarantined(run, federation.quarantine) if keep else {}
    for earlier in range(round_number - 1, max(round_number - keep, 1) - 1, -1):
        store = run.knowledge(earlier)
        for client in store.clients():
            if client in found or client in out:
                continue
            try:
                store.check(client)
            except (Damaged, OSError) as error:  # then it is as if it had not answered
                logger.warning("%s", error)
            else:
                found[client] = earlier
    return dict(sorted(found.items()))


def collect(run: RunDirectory, images: Images, kinds: Sequence[Kind], rounds: Sources) -> Bank:
    """Each client's answers of its round, in client order. Raises `Damaged`."""
    clients = defaultdict(list)
    for client, number in sorted(rounds.items()):
        clients[number].append(client)
    first, *others = (
        run.knowledge(number, images).bank(kinds, which)
        for number, which in sorted(clients.items(), reverse=True)
    )
    for other in others:
        first = first.beside(other)
    return first


def aged(
    bank: Bank,
    context: ExperimentContext,
    rounds: Sources,
    base: Callable[[int, int], int] = lambda _client, _round: 0,
) -> Bank:
    """The bank with what is left of each answer's weight, if answers differ in age.

    `decay` to the power of the rounds since the youngest answer about the image.

    Args:
        bank: Of `collect`.
        context: Of the run.
        rounds: As given to `collect`.
        base: (client, round) -> the round whose answers stayed where that round did not ask; 0 for
            none.
    """
    stale = context.experiment.federation.stale
    if stale.keep == 0:
        return bank
    asked = np.empty((len(bank.teachers), bank.num_samples), np.float32)
    for row, teacher in zip(asked, bank.teachers, strict=True):
        number = rounds[teacher.number]
        row[:] = number
        while before := base(teacher.number, number):  # a first answer is about all images
            part = context.subset(number)
            if part is None:
                break
            older = row == number
            older[part] = False
            row[older] = number = before
    age = asked.max(axis=0) - asked
    return replace(bank, decay=np.power(np.float32(stale.decay), age)) if age.any() else bank
