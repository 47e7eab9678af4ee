"""Averaging of adapters: LoRA beside a network that begins with a file and stays frozen."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from flwr.app import ArrayRecord, Message
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg
from torch import nn

from fedkd.config import ConfigError
from fedkd.models.network import Network
from fedkd.models.peft import Peft, adapt, low_rank
from fedkd.rounds import ExperimentContext
from fedkd.simulations.baselines import BASELINES
from fedkd.simulations.baselines.base import Baseline, OnRound, Outcome
from fedkd.simulations.baselines.fedavg import (
    Refine,
    Travel,
    at_least_one,
    average,
    refuse_other_networks,
)
from fedkd.simulations.baselines.loop import fresh_student
from fedkd.simulations.baselines.traffic import Arrays, plain_arrays, read


class _LowRank(Baseline):
    """What the three have in common: adapters and head travel, all else is in the file."""

    name: str

    def __init__(
        self,
        *,
        r: int = 8,
        alpha: float = 8.0,
        targets: str | tuple[str, ...] | None = None,
        epochs: int | None = None,
    ) -> None:
        try:
            self.peft = Peft(method="lora", r=r, alpha=alpha, targets=targets)
        except ValueError as error:
            raise ValueError(f"baseline {self.name!r}: {error}") from None
        self.epochs = at_least_one(self.name, "epochs", epochs)

    def _averaged(
        self,
        context: ExperimentContext,
        on_round: OnRound,
        *,
        fixed: bool = False,
        refine: Refine | None = None,
    ) -> Outcome:
        """All rounds.

        Args:
            context: Of the comparison.
            on_round: As in `run`.
            fixed: Whether A stays as it was drawn, the same for all.
            refine: What the server adds to the frozen weights; they are then sent to the clients.
        """
        refuse_other_networks(context, self.name)
        model = context.experiment.student.model
        if "peft" in model.options:
            raise ConfigError(
                f"student.model.peft: {self.name!r} brings its own LoRA (its options r, alpha, "
                "targets); take peft out of student.model"
            )
        if "weights" not in model.options:
            raise ConfigError(
                f"student.model.weights: {self.name!r} freezes the student's network, which would "
                "stay at its random weights; set it to a file"
            )
        travel = Travel(
            make=partial(self._made, fixed=fixed),
            down=_learnt if refine is None else _learnt_and_base,
            up=_learnt,
            load=_put,
        )
        return average(
            context, on_round, FlowerFedAvg(), epochs=self.epochs, refine=refine, travel=travel
        )

    def _made(self, context: ExperimentContext, *, fixed: bool) -> Network:
        network = fresh_student(context)
        try:
            adapt(network, self.peft, seed=context.experiment.seed)
        except ValueError as error:
            raise ConfigError(f"baseline {self.name!r}: {error}") from None
        if fixed:
            for pair in low_rank(network):
                pair.a.requires_grad_(False)
        return network


@BASELINES.register("fedavg_lora")
class FedAvgLoRA(_LowRank):
    """Averages both factors of the clients' LoRA, each for itself.

    The mean of A times the mean of B is not the mean of their products: inexact.

    Args:
        r: Rank.
        alpha: The product is weighted with alpha / r.
        targets: As of `peft`.
        epochs: Local epochs; default: `teachers.epochs`.

    References:
        Zhang et al., "Towards Building the Federated GPT: Federated Instruction Tuning" (FedIT),
            ICASSP 2024, https://arxiv.org/abs/2305.05644
    """

    name = "fedavg_lora"

    def run(self, context: ExperimentContext, on_round: OnRound) -> Outcome:
        """All rounds. Raises `ConfigError` if the student begins with no file."""
        return self._averaged(context, on_round)


@BASELINES.register("ffa_lora")
class FFALoRA(_LowRank):
    """LoRA whose A is drawn once for all and frozen; B alone is learnt and averaged, exactly.

    Args:
        r: Rank.
        alpha: The product is weighted with alpha / r.
        targets: As of `peft`.
        epochs: Local epochs; default: `teachers.epochs`.

    References:
        Sun et al., "Improving LoRA in Privacy-preserving Federated Learning", ICLR 2024,
            https://arxiv.org/abs/2403.12313
    """

    name = "ffa_lora"

    def run(self, context: ExperimentContext, on_round: OnRound) -> Outcome:
        """All rounds. Raises `ConfigError` if the student begins with no file."""
        return self._averaged(context, on_round, fixed=True)


@BASELINES.register("fedex_lora")
class FedExLoRA(_LowRank):
    """Averages both factors, and adds what that misses to the frozen weights: exact.

    The changed weights are sent to the clients, whole.

    Args:
        r: Rank.
        alpha: The product is weighted with alpha / r.
        targets: As of `peft`.
        epochs: Local epochs; default: `teachers.epochs`.

    References:
        Singhal et al., "FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of
            Foundation Models", ACL 2025, https://arxiv.org/abs/2410.09432
    """

    name = "fedex_lora"

    def run(self, context: ExperimentContext, on_round: OnRound) -> Outcome:
        """All rounds. Raises `ConfigError` if the student begins with no file."""
        return self._averaged(context, on_round, refine=add_what_is_missed)


def add_what_is_missed(student: Network, replies: Sequence[Message], _round: int) -> None:
    """Add mean(B A) - mean(B) mean(A) to the weights beside which each pair stands, in place.

    Args:
        student: With the mean of each factor.
        replies: The clients', with both factors and numbers of examples.
        _round: Not used.
    """
    names = {id(parameter): name for name, parameter in student.named_parameters()}
    arrived = [read(reply) for reply in replies]
    counts = np.array([_examples(reply) for reply in replies], np.float64)
    for pair in low_rank(student):
        products = [
            torch.from_numpy(arrays[names[id(pair.b)]]).double().flatten(1)
            @ torch.from_numpy(arrays[names[id(pair.a)]]).double().flatten(1)
            for arrays in arrived
        ]
        shares = torch.from_numpy(counts / counts.sum())
        mean = torch.einsum("k,kij->ij", shares, torch.stack(products))
        of_means = pair.b.detach().cpu().double().flatten(1) @ (
            pair.a.detach().cpu().double().flatten(1)
        )
        missed = pair.scaling * (mean - of_means).view_as(pair.base)
        with torch.no_grad():
            pair.base.add_(missed.to(pair.base.device, pair.base.dtype))


def _examples(reply: Message) -> float:
    value = reply.content.metric_records["metrics"]["num-examples"]
    assert isinstance(value, int | float)
    return float(value)


def _named(network: Network, parameters: Sequence[nn.Parameter]) -> dict[str, np.ndarray]:
    wanted = {id(parameter) for parameter in parameters}
    return {
        name: parameter.detach().cpu().numpy()
        for name, parameter in network.named_parameters()
        if id(parameter) in wanted
    }


def _learnt(network: Network) -> Arrays:
    """What learns."""
    return _named(network, [p for p in network.parameters() if p.requires_grad])


def _learnt_and_base(network: Network) -> Arrays:
    """What learns, and the frozen weights that the server changes."""
    changed = [pair.base for pair in low_rank(network)]
    return {**_learnt(network), **_named(network, changed)}


def _put(network: Network, arrays: Arrays | ArrayRecord) -> None:
    """Put either into a network."""
    own = dict(network.named_parameters())
    with torch.no_grad():
        for name, array in plain_arrays(arrays).items():
            own[name].copy_(torch.from_numpy(np.array(array)))
