"""Local training of many teachers together."""

from __future__ import annotations

from collections.abc import Sequence

from fedkd.data.images import ImageSet
from fedkd.models.network import Network
from fedkd.training.loop import Phase
from fedkd.training.optimizers import DEFAULT_OPTIMIZER, Optimizer
from fedkd.training.supervised import TEACHER, Fit, Pull, fit


def fit_many(
    teachers: Sequence[Network],
    shards: Sequence[ImageSet],
    *,
    seeds: Sequence[int],
    epochs: int = 10,
    batch_size: int = 16,
    optimizer: Optimizer = DEFAULT_OPTIMIZER,
    augment: str = "none",
    label_smoothing: float = 0.0,
    pulls: Sequence[Pull | None] | None = None,
    phase: Phase = TEACHER,
) -> list[Fit | Exception]:
    """Train each teacher (in place) on its shard, as `fit` does it.

    A client that fails does not stop the others: its error stands where its `Fit` would.

    Args:
        teachers: One network per client.
        shards: Its labelled private images.
        seeds: Its seed.
        epochs: As in `fit`.
        batch_size: Likewise.
        optimizer: Likewise.
        augment: Likewise.
        label_smoothing: Likewise.
        pulls: What is added to each client's loss; None: nothing.
        phase: In which words to complain.

    Returns:
        For each client what `fit` gives, or the error that it raises.

    Raises:
        ValueError: there are more or fewer shards, seeds or pulls than teachers.
    """
    pulls = [None] * len(teachers) if pulls is None else pulls
    for name, values in (("shards", shards), ("seeds", seeds), ("pulls", pulls)):
        if len(values) != len(teachers):
            raise ValueError(
                f"{name}: expected one for each of {len(teachers)} teachers, got {len(values)}"
            )
    fits: list[Fit | Exception] = []
    for teacher, shard, seed, pull in zip(teachers, shards, seeds, pulls, strict=True):
        try:
            fits.append(
                fit(
                    teacher,
                    shard,
                    epochs=epochs,
                    batch_size=batch_size,
                    optimizer=optimizer,
                    augment=augment,
                    label_smoothing=label_smoothing,
                    seed=seed,
                    pull=pull,
                    phase=phase,
                )
            )
        except (RuntimeError, ValueError) as error:
            fits.append(error)
    return fits
