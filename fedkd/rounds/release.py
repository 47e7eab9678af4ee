"""What a private release mechanism shows of a round's teachers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedkd.io.tensors import load_state
from fedkd.knowledge.kinds import Logits
from fedkd.knowledge.payload import Bank, Fused, Role, Teacher
from fedkd.privacy.noise import SecureGenerator
from fedkd.privacy.release.base import Released
from fedkd.privacy.release.gaussian import epsilon_of
from fedkd.rounds.context import ExperimentContext
from fedkd.runs.directory import RunDirectory, save_state
from fedkd.runs.events import AnswersReleased


def release_answers(
    context: ExperimentContext, run: RunDirectory, round_number: int, bank: Bank
) -> Fused:
    """The mechanism's answers; drawn once, however often the round is taken up again.

    Args:
        context: Of the run, with its mechanism.
        run: Keeps what was drawn.
        round_number: From 1.
        bank: What the teachers answered.

    Raises:
        RuntimeError: hardly an image was answered.
    """
    release, rounds, cells = context.release, context.experiment.rounds, context.transfer_cells
    assert release is not None
    if not _place(run, round_number).is_file():
        if cells is None:
            index = context.questions(round_number)
            out = release(_answers(bank, index), index, rounds, SecureGenerator())
        else:
            ballots = cells.ballots(_answers(bank, torch.arange(bank.num_samples)))
            asked = torch.arange(len(cells))
            out = cells.spread(release(ballots, asked, rounds, SecureGenerator()))
        _keep(run, round_number, out)
    return let_out(context, run, round_number)


def keep_sum(
    context: ExperimentContext,
    run: RunDirectory,
    round_number: int,
    values: Mapping[int, np.ndarray],
) -> None:
    """Keep what comes out of a secure sum; its noise is in it already.

    Args:
        context: Of the run, with its mechanism.
        run: Where it is kept.
        round_number: From 1.
        values: Client -> masked votes, of all in the sum.
    """
    release, cells = context.release, context.transfer_cells
    assert release is not None
    index = context.questions(round_number) if cells is None else torch.arange(len(cells))
    each = context.round_sum
    total = np.zeros(each.size, np.uint32)
    for _, part in sorted(values.items()):
        total = total + part
    out = Released(release.scores(each.decoded(total), len(values)), index, each.mu)
    _keep(run, round_number, out if cells is None else cells.spread(out), sorted(values))


def summed(run: RunDirectory, round_number: int) -> list[int]:
    """Whose votes are in the secure sum of a round; none without a sum."""
    place = _place(run, round_number)
    return [int(n) for n in load_state(place)["clients"]] if place.is_file() else []


def let_out(context: ExperimentContext, run: RunDirectory, round_number: int) -> Fused:
    """What the student learns from: as it is kept.

    Raises:
        RuntimeError: hardly an image was answered.
    """
    release, experiment = context.release, context.experiment
    images = context.data.transfer.images
    assert release is not None
    state = load_state(_place(run, round_number))
    out = Released(state["scores"], state["index"], state["mu"])
    run.record(
        AnswersReleased(
            round=round_number,
            mechanism=experiment.release.name if experiment.release else "",
            answered=len(out.index),
            mu=out.mu,
            epsilon=epsilon_of(out.mu, release.delta),
            delta=release.delta,
            unit=release.unit,
            cells=context.cells or 0,
        )
    )
    if len(out.index) < 2:
        raise RuntimeError(
            f"round {round_number}: the release answered {len(out.index)} of the transfer "
            "images; raise its epsilon, lower its threshold, or take more clients"
        )
    return Fused.of(
        Teacher(0, role=Role.RELEASE),
        out.scores.clamp(min=1e-4).log(),
        probabilities=out.scores,
        targets=None if images.labels is None else images.labels[out.index],
        index=out.index,
    )


def _place(run: RunDirectory, round_number: int) -> Path:
    return run.knowledge(round_number).folder / "released.pt"


def _keep(run: RunDirectory, round_number: int, out: Released, clients: Sequence[int] = ()) -> None:
    state = {"scores": out.scores, "index": out.index, "mu": out.mu}
    if clients:
        state["clients"] = torch.tensor(clients)
    save_state(_place(run, round_number), state)


def _answers(bank: Bank, index: Tensor) -> Tensor:
    """What the teachers answer about some images: probabilities, (M, K, C)."""
    return torch.softmax(bank.rows(index, kinds=(Logits(),)).logits, dim=-1)
