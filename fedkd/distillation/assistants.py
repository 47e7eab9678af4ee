"""Networks of the server that teach beside the clients' teachers."""

from __future__ import annotations

from typing import Literal

from fedkd.knowledge.payload import Fused, Knowledge

AssistantMode = Literal["takd", "dgkd"]


def with_assistant(fused: Fused, assistant: Knowledge, mode: AssistantMode, rank: int) -> Fused:
    """What the next network of a chain learns from, after one more assistant has been trained.

    Args:
        fused: What that assistant itself learnt from.
        assistant: Its answers about the same samples.
        mode: "takd" leaves the assistant alone to teach (TAKD); "dgkd" adds it to all that
            came before it (DGKD), each assistant with the weight of all first teachers together.
        rank: How many assistants there are with this one.

    References:
        Mirzadeh et al., "Improved Knowledge Distillation via Teacher Assistant", AAAI 2020,
            https://arxiv.org/abs/1902.03393
        Son et al., "Densely Guided Knowledge Distillation using Multiple Teacher Assistants",
            ICCV 2021, https://arxiv.org/abs/2009.08825
    """
    if mode == "takd":
        # The targets stay: those of the first teachers, or the labels.
        return fused.replaced_by(assistant)
    return fused.with_teacher(assistant, 1 / (rank + 1))
