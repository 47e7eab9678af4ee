"""What a client may spend of the privacy of its images, and what it has spent."""

from __future__ import annotations

import hashlib
import logging
import math
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from fedkd.data.images import ImageSet
from fedkd.io.tensors import load_state
from fedkd.privacy.accounting import Steps
from fedkd.privacy.label_dp import keep_probability, randomised
from fedkd.privacy.ledger import Account, BudgetSpent, Ledger, LedgerBroken
from fedkd.privacy.plan import Plan
from fedkd.privacy.policy import Policy, PolicyRefused
from fedkd.privacy.release.base import Release
from fedkd.privacy.release.secure import SecureSum
from fedkd.rounds.client_files import SavedTeacher
from fedkd.rounds.context import ExperimentContext
from fedkd.runs.directory import save_state

logger = logging.getLogger(__name__)

# Epsilon of an owner who sets none.
_UNLIMITED = 1e9


class Budget:
    """A client's accounts: of this run, and of all runs on the same images.

    Without a promise everything is free.

    Args:
        context: What the config means on this machine.
        number: Which client this is.
        folder: Keeps the account of this run; survives restarts.
        policy: What the node allows; None in a simulation.
        budgets: Where the node keeps the accounts of all runs.
    """

    def __init__(
        self,
        context: ExperimentContext,
        number: int,
        folder: Path,
        policy: Policy | None,
        budgets: Path | None,
    ) -> None:
        self._context = context
        self._plan = context.plan
        self._privacy = context.experiment.teachers.privacy
        self._data = context.data
        self._number = number
        self._folder = folder
        self._policy = policy
        self._budgets = budgets

    @property
    def spent(self) -> float | None:
        """Epsilon that this client has spent; None if it trains without a promise.

        Public: it follows from the number of rounds, not from any image.
        """
        if self._privacy is not None and self._privacy.mechanism == "label_dp":
            return self._privacy.epsilon
        return None if self._plan is None else self._of_run(self._plan).spent

    def paid(self, round_number: int) -> bool:
        """Whether the budget allowed this round's training."""
        return self._plan is None or self._of_run(self._plan).paid(round_number)

    @property
    def seal(self) -> str:
        """Marks a teacher as of this account; empty without one."""
        return "" if self._plan is None else self._of_run(self._plan).seal

    def reserve(self, round_number: int, last: SavedTeacher | None) -> bool:
        """Reserve what a round's training costs, before an image is looked at.

        Returns:
            Whether the budget pays for it.

        Raises:
            PolicyRefused: the promise means nothing for this many images, or what the server
                releases of a round would cost more than all runs may.
            LedgerBroken: the account does not know of the last teacher.
        """
        plan = self._plan
        if plan is None:
            self._reserve_release(round_number)
            return True
        self._check_delta(plan.delta)
        ledger = self._of_run(plan)
        if last is not None and not ledger.holds(last.seal):
            raise LedgerBroken(
                f"{ledger.path}: does not know of the teacher {last.name}: nothing more is spent"
            )
        everything = self._of_all_runs()
        try:
            if everything is not None and ledger.affords(plan.steps):
                everything.reserve(round_number, plan.steps)
            ledger.reserve(round_number, plan.steps)
        except BudgetSpent:
            return False
        return True

    def _reserve_release(self, round_number: int) -> None:
        """Count what a trusted server lets out of a round, where a node counts all runs."""
        release = self._context.release
        if release is None or self._context.experiment.sums_securely:  # `reserve_sum` counts it
            return
        self._check_delta(release.delta)
        if (everything := self._of_all_runs()) is None:
            return
        mu = release.budget() / math.sqrt(self._context.experiment.rounds)
        try:
            everything.reserve(round_number, Steps.gaussian(mu))
        except BudgetSpent as error:
            # To go on with an older teacher would be another release about the same images.
            raise PolicyRefused(f"promise.epsilon: {error}") from None

    def reserve_sum(self, round_number: int, release: Release, each: SecureSum, key: str) -> None:
        """Book what votes in a secure sum cost, before they leave.

        Args:
            round_number: From 1.
            release: The mechanism that takes the sum.
            each: What one sum costs.
            key: This client's key for the sum; a key is answered under once.

        Raises:
            BudgetSpent: the run's sums and repetitions, or this node's budget, are used up.
            PolicyRefused: the promise means nothing for this many images.
        """
        self._check_delta(release.delta)
        account = Account(
            self._number, self._fingerprint, release.epsilon, release.delta, "gaussian"
        )
        ledger = Ledger(self._folder / "privacy.jsonl", account)
        ledger.reserve(round_number, each.steps, key)
        if (everything := self._of_all_runs()) is not None:
            everything.reserve(round_number, each.steps)

    def _check_delta(self, delta: float) -> None:
        """Refuse a delta with which an image that this node holds might be published."""
        images = self._data.shard(self._number)
        if self._policy is not None and delta * len(images) >= 1:
            text = "delta %g is not below 1 / %d images held: refused"
            logger.error(text, delta, len(images))
            # How many there are is this node's secret, so the reason stays in its own log.
            raise PolicyRefused("promise.delta: refused; this node's log says why")

    def settle(self, round_number: int) -> None:
        """Book what was reserved: the round's teacher is kept."""
        if self._plan is not None:
            self._of_run(self._plan).settle(round_number)

    @property
    def keeps(self) -> float | None:
        """Share of labels that randomised response keeps; None without it."""
        privacy = self._privacy
        if privacy is None or privacy.mechanism != "label_dp" or privacy.epsilon is None:
            return None
        return keep_probability(privacy.epsilon, len(self._data.classes))

    def images(self) -> ImageSet:
        """The private images; with randomised labels if only labels are protected."""
        privacy, shard = self._privacy, self._data.shard(self._number)
        if privacy is None or privacy.mechanism != "label_dp" or shard.labels is None:
            return shard
        assert privacy.epsilon is not None
        place = self._folder / "labels.pt"
        everything = self._of_all_runs()
        if everything is not None and self._budgets is not None:  # of all runs, not of this one
            place = self._budgets / f"{self._fingerprint[:32]}-labels-{privacy.epsilon:g}.pt"
        if not place.is_file():  # drawn once: a second draw would be a second release
            if everything is not None:
                everything.reserve_labels(privacy.epsilon)
            labels = randomised(shard.labels, len(shard.classes), privacy.epsilon)
            save_state(place, {"labels": labels}, private=True)
        return replace(shard, labels=load_state(place)["labels"])

    def _of_run(self, plan: Plan) -> Ledger:
        assert self._privacy is not None
        account = Account(
            self._number, self._fingerprint, plan.epsilon, plan.delta, self._privacy.accountant
        )
        return Ledger(self._folder / "privacy.jsonl", account)

    def _of_all_runs(self) -> Ledger | None:
        """None if the node has no policy."""
        if self._policy is None or self._budgets is None:
            return None
        promise, release = self._policy.promise, self._context.release
        own = 0.5 if release is None else release.delta
        account = Account(
            self._number,
            self._fingerprint,
            promise.epsilon or _UNLIMITED,
            promise.delta or (self._plan.delta if self._plan else own),
            "gaussian" if self._privacy is None else self._privacy.accountant,
        )
        return Ledger(self._budgets / f"{self._fingerprint[:32]}.jsonl", account, of_run=False)

    @cached_property
    def _fingerprint(self) -> str:
        """Of all private images with their labels, held out or not: a run chooses which are."""
        images = self._data.held_by(self._number)
        data = hashlib.sha256(images.fingerprint().encode())
        if images.labels is not None:
            data.update(images.labels.numpy().tobytes())
        return data.hexdigest()
