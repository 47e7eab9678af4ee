"""Assistants between large teachers and a small student."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import torch

from fedkd.knowledge.kinds import Logits
from fedkd.knowledge.payload import Bank, Fused, Knowledge

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
    own = torch.softmax(assistant.tensors[Logits()].float(), dim=-1)
    arrays = {kind: [tensor.numpy()] for kind, tensor in assistant.tensors.items()}
    if guidance == "next":
        # The targets stay: they are what the first teachers (or the labels) say.
        return Fused(Bank((assistant.teacher,), arrays), own, fused.targets)
    bank = fused.bank
    # What only fusion rules read (an assistant has no images of its own) has done its part.
    together = {kind: [*bank.arrays[kind], *array] for kind, array in arrays.items()}
    share = 1 / (rank + 1)
    count, samples = len(bank.teachers), bank.num_samples
    before = np.full((count, samples), 1 / count) if bank.weights is None else bank.weights
    weights = np.concatenate([before * (1 - share), np.full((1, samples), share)])
    classes = bank.class_weights
    if classes is not None:
        classes = torch.cat([classes, torch.ones(1, classes.shape[1])])
    return replace(
        fused,
        bank=Bank(
            (*bank.teachers, assistant.teacher), together, weights.astype(np.float32), classes
        ),
        probabilities=fused.probabilities * (1 - share) + own * share,
    )
