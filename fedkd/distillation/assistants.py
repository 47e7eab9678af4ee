"""Networks of the server that teach beside the clients' teachers."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch

from fedkd.knowledge.payload import Fused, Knowledge

Guidance = Literal["next", "dense"]


def with_assistant(fused: Fused, assistant: Knowledge, guidance: Guidance, rank: int) -> Fused:
    """What the next network of a chain learns from, after one more assistant has been trained.

    Args:
        fused: What that assistant itself learnt from.
        assistant: What it says of the same samples.
        guidance: "next" leaves the assistant alone to teach (TAKD); "dense" adds it to all that
            came before it (DGKD), each assistant with the same say as all first teachers together.
        rank: How many assistants there are with this one.

    References:
        Mirzadeh et al., "Improved Knowledge Distillation via Teacher Assistant", AAAI 2020,
            https://arxiv.org/abs/1902.03393
        Son et al., "Densely Guided Knowledge Distillation using Multiple Teacher Assistants",
            ICCV 2021, https://arxiv.org/abs/2009.08825
    """
    if guidance == "next":
        # The targets stay: they are what the first teachers (or the labels) say.
        return fused.replaced_by(assistant)
    return fused.with_teacher(assistant, 1 / (rank + 1))


def with_memory(fused: Fused, student: Knowledge, share: float) -> Fused:
    """Let the student of the round before teach too: targets averaged over rounds.

    Each round's targets are then a running mean of what the teachers said in all rounds, in so far
    as the student has learnt it (temporal ensembling with the student as the memory).

    Args:
        fused: What the teachers say in this round.
        student: What the student said before this round.
        share: Its say, in [0, 1).

    References:
        Laine and Aila, "Temporal Ensembling for Semi-Supervised Learning", ICLR 2017,
            https://arxiv.org/abs/1610.02242
    """
    told = fused.with_teacher(student, share)
    learnt = torch.equal(fused.targets, fused.probabilities.argmax(dim=1))
    return replace(told, targets=told.probabilities.argmax(dim=1)) if learnt else told
