"""Does the code do what a run's promise rests on?"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any, TypedDict

from fedkd.config import ConfigError
from fedkd.io.tensors import load_state
from fedkd.privacy.dp_sgd import Mechanism
from fedkd.rounds import ExperimentContext, Notify, silent
from fedkd.runs.directory import RunDirectory
from fedkd.studies.audit.finding import FALSE_ALARM, overall
from fedkd.studies.audit.lies import of_labels
from fedkd.studies.audit.noisy_steps import TRAININGS, of_dp_sgd
from fedkd.studies.audit.promise import Claim, promised

FEWEST = 50


class MechanismRecord(TypedDict):
    """What `audit.json` holds of it under `mechanism`; `training` as in the other audit."""

    client: int
    training: dict[str, Any]
    trainings: int
    false_alarm: float
    claim: dict[str, Any]
    findings: list[dict[str, Any]]
    verdict: str


def audit_mechanism(
    run: RunDirectory,
    context: ExperimentContext,
    client: int,
    *,
    mechanism: Mechanism | None = None,
    delta: float = 1e-5,
    trainings: int = TRAININGS,
    notify: Notify = silent,
) -> MechanismRecord:
    """Test the code behind a run's promise. No private image is read.

    Args:
        run: Whose config and ledger say what was promised.
        context: Of its experiment.
        client: Whose ledger.
        mechanism: What if its teachers were trained so in each round? For runs that promise
            nothing.
        delta: Of the claim there.
        trainings: Of each kind; the more, the larger an epsilon can be refuted.
        notify: Receives how many are done.

    Raises:
        ConfigError: there is no such mechanism, or there are too few trainings.
    """
    if trainings < FEWEST:
        raise ConfigError(
            f"--trainings: expected at least {FEWEST}, got {trainings}: fewer prove nothing"
        )
    promise = promised(run, context, client)
    training = promise.training
    if promise.claim is not None:
        delta = promise.claim.delta
    elif mechanism is not None:
        training = replace(training, mechanism=mechanism)
    if training.rounds == 0:
        raise ConfigError(f"{run.path}: no round of it is finished, so there is nothing to audit")
    if training.mechanism is not None:
        privacy = context.experiment.teachers.privacy
        claim, findings = of_dp_sgd(
            training.mechanism,
            training.rounds,
            together=context.experiment.clients > 1,
            delta=delta,
            accountant="prv" if privacy is None else privacy.accountant,
            trainings=trainings,
            notify=notify,
        )
    elif training.label_epsilon is not None:
        claim = Claim(training.label_epsilon, 0.0)
        findings = of_labels(
            training.label_epsilon, len(context.data.classes), _kept_by_clients(run, context)
        )
    else:
        raise ConfigError(
            f"{run.path}: its teachers were trained neither with DP-SGD nor on randomised labels, "
            "so there is no mechanism to audit; --noise-multiplier N audits one that they might "
            "have been trained with"
        )
    return {
        "client": client,
        "training": asdict(training),
        "trainings": trainings,
        "false_alarm": FALSE_ALARM,
        "claim": asdict(claim),
        "findings": [asdict(finding) for finding in findings],
        "verdict": overall(findings),
    }


def _kept_by_clients(run: RunDirectory, context: ExperimentContext) -> tuple[int, int] | None:
    """Of the labels that the run's clients learnt, how many are true, and all; None if unknown."""
    right = total = 0
    for client in range(context.data.num_clients):
        place = run.client(client) / "labels.pt"
        if place.is_file():
            learnt, true = load_state(place)["labels"], context.data.shard(client).labels
            right += int((learnt == true).sum())
            total += len(learnt)
    return (right, total) if total else None
