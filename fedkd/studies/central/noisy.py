"""A study's networks that learn from labels of which some are wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fedkd.build import as_partner, build_optimizer
from fedkd.config import Component, Noisy
from fedkd.data.images import ImageSet
from fedkd.distillation.trainer import EpochRecord, Snapshot
from fedkd.models.network import Network
from fedkd.randomness import stream_seed
from fedkd.studies.central.config import Training
from fedkd.studies.engine import Record
from fedkd.training.loop import Phase
from fedkd.training.noisy.loop import Noted, fit_noisy
from fedkd.training.noisy.pair import both_of, paired
from fedkd.training.noisy.pretraining import pretrain

Make = Callable[[Component, int], Network]
"""(model, seed of its weights) -> a fresh network on the device."""


@dataclass(frozen=True)
class Pair:
    """The networks of one training.

    Attributes:
        noisy: How they are trained.
        first: The network that is asked for.
        second: Its partner; None where there is none.
        network: What answers: a teacher as `noisy.answer` says, a student is the first alone.
    """

    noisy: Noisy
    first: Network
    second: Network | None
    network: Network

    @classmethod
    def of(cls, noisy: Noisy, model: Component, make: Make, init: int, role: str) -> Pair:
        """Untrained networks. Raises `ConfigError` if they are no pair."""
        first = make(model, init)
        if noisy.method == "gmm":
            return cls(noisy, first, None, first)
        partner, seed = noisy.partner.model or model, stream_seed(init, "partner")
        second = as_partner(noisy, first, make(partner, seed), (model, partner), seed)
        together = role == "teacher" and noisy.answer != "a"
        return cls(noisy, first, second, paired(first, second) if together else first)

    def fit(
        self,
        shard: ImageSet,
        test: ImageSet,
        recipe: Training,
        *,
        role: str,
        seed: int,
        state: Mapping[str, Any] | None,
        on_epoch: Callable[..., None],
    ) -> None:
        """Train them, or go on with it.

        Args:
            shard: What they learn from.
            test: What they are tested on.
            recipe: How they are trained.
            role: Whose training this is, for messages.
            seed: Of everything drawn.
            state: Of an interrupted training.
            on_epoch: Called with an epoch's record, a maker of states, and as keywords the
                accuracy of what answers and what is measured on noisy labels.
        """
        noisy, optimizer = self.noisy, build_optimizer(recipe.optimizer)
        both = both_of(self.network)

        def told(record: Record, snapshot: Snapshot) -> None:
            accuracy = record.get("accuracy_a" if both is None else "accuracy_both")
            loss = EpochRecord(record["epoch"], record["loss_a"] or 0.0, {}, record["lr"])
            on_epoch(loss, snapshot, accuracy=accuracy, noisy=record)

        if state is None and self.second is not None and noisy.partner.pretraining != "none":
            pretrain(
                self.second,
                shard.images,
                epochs=noisy.partner.epochs,
                batch_size=recipe.batch_size,
                optimizer=optimizer,
                augment=recipe.augment,
                seed=stream_seed(seed, "partner"),
            )
        trained = fit_noisy(
            self.first,
            self.second,
            shard,
            noisy.options(),
            epochs=recipe.epochs,
            knows=noisy.knows,
            batch_size=recipe.batch_size,
            optimizer=optimizer,
            augment=recipe.augment,
            seed=seed,
            state=state,
            done=0 if state is None else state["epoch"],
            noted=Noted(shard.true_labels, test, recipe.test_every),
            on_epoch=told,
            phase=Phase(f"the {role}"),
        )
        if both is not None:
            both.shares.copy_(torch.tensor(trained.shares))


def saved_network(about: Mapping[str, Any], make: Make) -> Network:
    """The untrained network that a file's weights fit: of one model, or of a pair."""
    model = Component(name=about["model"], **about["options"])
    if about.get("noisy") is None:
        return make(model, 0)
    return Pair.of(Noisy(**about["noisy"]), model, make, 0, "teacher").network
