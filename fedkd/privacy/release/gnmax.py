"""PATE: the class with most votes, under noise."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from fedkd.privacy.noise import SecureGenerator
from fedkd.privacy.release import RELEASES
from fedkd.privacy.release.base import Release, Released, noisy_sum


def votes_of(probabilities: Tensor) -> Tensor:
    """(M, K, C) to the number of teachers that vote for each class, (K, C)."""
    return ballots_of(probabilities).sum(dim=0)


def ballots_of(probabilities: Tensor) -> Tensor:
    """Each teacher's answers (…, K, C) to a vote for one class, float64."""
    return one_hot(probabilities.argmax(dim=-1), probabilities.shape[-1]).double()


@RELEASES.register("gnmax")
@dataclass(kw_only=True, eq=False)
class GNMax(Release):
    """The noisy histogram of the teachers' votes; its largest bar is the label.

    The cost does not depend on the votes, so the whole histogram may be published for what its
    winner alone would cost.

    Args:
        epsilon: See `Release`; so are `delta`, `queries`, `cells`, `unit` and `secure`.
        min_votes: Fewer teachers are refused: with 10 of them epsilon 8 buys five useful labels,
            with 50 some 140.

    References:
        Papernot et al., "Scalable Private Learning with PATE", ICLR 2018,
            https://arxiv.org/abs/1802.08908
    """

    additive: ClassVar[bool] = True

    min_votes: int = 50

    def __call__(
        self, probabilities: Tensor, index: Tensor, rounds: int, noise: SecureGenerator
    ) -> Released:
        """One-hot winners. Raises `ValueError` for too few teachers."""
        if len(probabilities) < self.min_votes:
            raise ValueError(
                f"release: {len(probabilities)} teachers voted, at least {self.min_votes} are "
                "needed for labels that are worth their noise (release.min_votes)"
            )
        votes = votes_of(probabilities)
        sigma = self.deviation(len(index), rounds)
        winners = self.scores(noisy_sum(votes, sigma, noise), len(probabilities))
        mu = self.sensitivity * math.sqrt(len(index)) / sigma if len(index) else 0.0
        return Released(winners, index, mu)

    def contributions(self, probabilities: Tensor) -> Tensor:
        """One vote."""
        return ballots_of(probabilities)

    def scores(self, noisy: Tensor, teachers: int) -> Tensor:
        """The largest bar."""
        return one_hot(noisy.argmax(dim=1), noisy.shape[1]).float()

    def wider(self, classes: int, step: float) -> float:
        """Votes are whole."""
        return 1.0


@RELEASES.register("confident_gnmax")
@dataclass(kw_only=True, eq=False)
class ConfidentGNMax(GNMax):
    """GNMax that answers only where the teachers agree.

    Each image is first checked: is the highest bar, under noise of its own, above a threshold?
    Answers stop when the round's share of the budget would be overdrawn, which holds the claim
    whatever the votes are (a privacy filter; exact for Gaussian noise).

    Args:
        epsilon: See `Release`; so are `delta`, `queries`, `cells` and `unit`.
        threshold: Share of the teachers that must agree.
        check: Noise of the check in multiples of the noise of an answer.
        noise: Noise of an answer as a share of the number of teachers.
        min_votes: See `GNMax`.

    References:
        Papernot et al. 2018, Algorithm 1; filter: Smith and Thakurta, "Fully Adaptive
            Composition for Gaussian Differential Privacy", 2022, https://arxiv.org/abs/2210.17520
    """

    additive: ClassVar[bool] = False

    threshold: float = 0.6
    check: float = 2.0
    noise: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.threshold <= 1 or self.check <= 0 or self.noise <= 0:
            raise ValueError(
                "release 'confident_gnmax': threshold lies in (0, 1], check and noise are positive"
            )

    def noise_on_votes(self, queries: int, rounds: int, clients: int) -> float:
        """Raises `ValueError` if a round's share of the budget does not pay for two answers."""
        sigma = self.noise * clients
        each = 1 / (self.check * sigma) ** 2 + self.sensitivity**2 / sigma**2
        paid = int(self.budget() ** 2 / rounds / each)
        if paid < 2:
            raise ValueError(
                f"release 'confident_gnmax': epsilon {self.epsilon:g} in {rounds} rounds pays for "
                f"{paid} answers a round, at least 2 are needed: raise epsilon, noise "
                f"({self.noise:g}) or clients ({clients}), or take fewer rounds"
            )
        return sigma

    def __call__(
        self, probabilities: Tensor, index: Tensor, rounds: int, noise: SecureGenerator
    ) -> Released:
        """One-hot winners of the images on which the teachers agree."""
        teachers = len(probabilities)
        super().__call__(probabilities[:, :0], index[:0], rounds, noise)  # enough teachers?
        votes = votes_of(probabilities)
        sigma = self.noise * teachers
        sigma_check = self.check * sigma
        # One replaced teacher moves the highest bar by one at most.
        checking, answering = 1 / sigma_check**2, self.sensitivity**2 / sigma**2
        left = self.budget() ** 2 / rounds
        spent = 0.0
        answered, winners = [], []
        for place in noise.permutation(len(index)).tolist():  # stopping must not favour the first
            if spent + checking + answering > left:
                break
            spent += checking
            top = float(noisy_sum(votes[place].max(), sigma_check, noise))
            if top < self.threshold * teachers:
                continue
            spent += answering
            answered.append(place)
            winners.append(int(noisy_sum(votes[place], sigma, noise).argmax()))
        places, order = torch.tensor(answered, dtype=torch.long).sort()
        labels = torch.tensor(winners, dtype=torch.long)[order]
        scores = one_hot(labels, votes.shape[1]).float()
        return Released(scores, index[places], math.sqrt(spent))
