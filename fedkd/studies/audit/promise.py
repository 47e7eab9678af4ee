"""How a run's teachers were trained, and what it promised about that."""

from __future__ import annotations

from dataclasses import dataclass

from fedkd.config import ConfigError, Experiment
from fedkd.privacy.dp_sgd import Mechanism
from fedkd.privacy.ledger import LedgerBroken
from fedkd.rounds import Client, ExperimentContext
from fedkd.runs.directory import RunDirectory
from fedkd.runs.events import RoundFinished
from fedkd.studies.audit.one_run import Bound


@dataclass(frozen=True)
class Claim:
    """(epsilon, delta) for one image, with its label, of one client over the whole run."""

    epsilon: float
    delta: float


@dataclass(frozen=True)
class Training:
    """How one client's last teacher came about.

    Attributes:
        rounds: In which it looked at private images.
        mechanism: Of each round, if it was DP-SGD.
        label_epsilon: Of its labels, if those were randomised.
    """

    rounds: int
    mechanism: Mechanism | None = None
    label_epsilon: float | None = None


@dataclass(frozen=True)
class Promise:
    """What a run itself promises.

    Attributes:
        training: Of the client under audit.
        claim: What the audit can test; None where it is about something else than images.
        text: What is promised and whether the audit tests it, for people; empty for no promise.
    """

    training: Training
    claim: Claim | None
    text: str


def promised(run: RunDirectory, context: ExperimentContext, client: int) -> Promise:
    """Promise and training of one client, from the plan and the client's ledger.

    The claim is what the ledger says was spent, which is at most the plan's epsilon: the stricter
    of the two to hold against the training.

    Raises:
        ConfigError: the ledger is missing, damaged, or empty.
    """
    experiment = context.experiment
    privacy, plan = experiment.teachers.privacy, context.plan
    if plan is None:
        rounds = len({event.round for event in run.events(RoundFinished)})
        label_epsilon = None if privacy is None else privacy.epsilon
        training = Training(_passes(experiment, rounds), label_epsilon=label_epsilon)
        return Promise(training, None, _untested(experiment))
    folder = run.client(client)
    if not (folder / "privacy.jsonl").is_file():
        raise ConfigError(
            f"{run.path}: client {client} keeps no ledger in clients/, so what it has spent is "
            "not known; on real nodes it stays there, and so must the audit"
        )
    account = Client(context, client, run.identity, folder)
    try:
        spent = account.budget.spent
        paid = sum(account.budget.paid(number) for number in range(1, experiment.rounds + 1))
    except LedgerBroken as error:
        raise ConfigError(str(error)) from None
    if not spent:
        raise ConfigError(f"{folder}: nothing was spent, so there is no claim to audit")
    text = (
        f"The run promises ({plan.epsilon:.3g}, {plan.delta:g})-differential privacy of each image "
        f"of a client, by DP-SGD; client {client}'s ledger counts {spent:.3g} in {paid} "
        f"{'round' if paid == 1 else 'rounds'}: this is the claim that canaries test."
    )
    return Promise(
        Training(_passes(experiment, paid), plan.mechanism), Claim(spent, plan.delta), text
    )


def stronger(*bounds: Bound | None) -> Bound | None:
    """The largest of some bounds, if there is one; where all are 0, what could have been seen."""
    there = [bound for bound in bounds if bound is not None]
    return max(there, key=lambda bound: (bound.epsilon, bound.largest), default=None)


def verdict(claim: Claim | None, bound: Bound | None) -> str:
    """`refuted`, `consistent`, `no power` (the claim is beyond the audit's sight), `no claim`.

    Without canaries a claim is `untested`.
    """
    if claim is None:
        return "no claim"
    if bound is None:
        return "untested"
    if bound.epsilon > claim.epsilon:
        return "refuted"
    return "no power" if bound.largest <= claim.epsilon else "consistent"


def _passes(experiment: Experiment, rounds: int) -> int:
    """A teacher that begins anew every round has seen private images in one alone."""
    return rounds if experiment.teachers.warm_start else min(rounds, 1)


def _untested(experiment: Experiment) -> str:
    """What a run without DP-SGD promises, and why the audit cannot hold that against it."""
    privacy, release = experiment.teachers.privacy, experiment.release
    if privacy is not None:
        return (
            f"The run promises label privacy, epsilon {privacy.epsilon:g}: nobody learns an "
            "image's label, but that the image was used is no secret. The audit does not test "
            "that: its attacks and its bound are about images, for which nothing is promised. "
            "How labels are randomised is tested with --mechanism."
        )
    if release is not None:
        return (
            f"The run promises that what leaves the server is private (release {release.name!r}). "
            "The audit does not test that: its bound is about a teacher, which the server may see "
            "as it is. Of the attacks only those on the student are on what was promised."
        )
    return ""
