"""What a private release mechanism shows of a round's teachers."""

from __future__ import annotations

import torch
from torch import Tensor

from fedkd.config import Experiment
from fedkd.data.images import ImageSet
from fedkd.io.tensors import load_state
from fedkd.knowledge.kinds import Logits
from fedkd.knowledge.payload import Bank, Fused, Role, Teacher
from fedkd.privacy.noise import SecureGenerator
from fedkd.privacy.release.base import Release, Released
from fedkd.privacy.release.cells import Cells
from fedkd.privacy.release.gaussian import epsilon_of
from fedkd.randomness import stream
from fedkd.runs.directory import RunDirectory, save_state
from fedkd.runs.events import AnswersReleased


def release_answers(
    release: Release,
    experiment: Experiment,
    run: RunDirectory,
    round_number: int,
    bank: Bank,
    images: ImageSet,
    cells: int | None,
) -> Fused:
    """The mechanism's answers; drawn once, however often the round is taken up again.

    Args:
        release: The mechanism.
        experiment: The experiment.
        run: Keeps what was drawn.
        round_number: From 1.
        bank: What the teachers answered.
        images: The transfer images.
        cells: How many cells of them are asked about; None: single images.

    Raises:
        RuntimeError: hardly an image was answered.
    """
    place = run.knowledge(round_number).folder / "released.pt"
    if not place.is_file():
        if cells is None:
            generator = stream(experiment.seed, "queries", round_number)
            index = release.asked(bank.num_samples, generator)
            out = release(_answers(bank, index), index, experiment.rounds, SecureGenerator())
        else:
            among = Cells.among(images.images, cells, len(images.classes), experiment.seed)
            ballots = among.ballots(_answers(bank, torch.arange(bank.num_samples)))
            asked = torch.arange(len(among))
            out = among.spread(release(ballots, asked, experiment.rounds, SecureGenerator()))
        save_state(place, {"scores": out.scores, "index": out.index, "mu": out.mu})
    out = Released(**load_state(place))
    run.record(
        AnswersReleased(
            round=round_number,
            mechanism=experiment.release.name if experiment.release else "",
            answered=len(out.index),
            mu=out.mu,
            epsilon=epsilon_of(out.mu, release.delta),
            delta=release.delta,
            unit=release.unit,
            cells=cells or 0,
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


def _answers(bank: Bank, index: Tensor) -> Tensor:
    """What the teachers answer about some images: probabilities, (M, K, C)."""
    return torch.softmax(bank.rows(index, kinds=(Logits(),)).logits, dim=-1)
