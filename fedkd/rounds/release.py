"""What a private release mechanism shows of a round's teachers."""

from __future__ import annotations

import torch
from torch import Tensor

from fedkd.config import Experiment
from fedkd.io.tensors import load_state
from fedkd.knowledge.kinds import Logits
from fedkd.knowledge.payload import Bank, Fused, Role, Teacher
from fedkd.privacy.noise import SecureGenerator
from fedkd.privacy.release.base import Release, Released
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
    labels: Tensor | None,
) -> Fused:
    """The mechanism's answers; drawn once, however often the round is taken up again.

    Raises:
        RuntimeError: hardly an image was answered.
    """
    place = run.knowledge(round_number).folder / "released.pt"
    if not place.is_file():
        generator = stream(experiment.seed, "queries", round_number)
        index = release.asked(bank.num_samples, generator)
        probabilities = torch.softmax(bank.rows(index, kinds=(Logits(),)).logits, dim=-1)
        out = release(probabilities, index, experiment.rounds, SecureGenerator())
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
        targets=None if labels is None else labels[out.index],
        index=out.index,
    )
