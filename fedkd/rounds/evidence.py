"""What fusion rules may look at when they are fitted to a round's teachers."""

from __future__ import annotations

from fedkd.fusion.base import FitContext
from fedkd.knowledge.payload import Bank
from fedkd.knowledge.query import Images
from fedkd.models.network import Network
from fedkd.randomness import stream_seed
from fedkd.rounds.context import ExperimentContext
from fedkd.runs.directory import RunDirectory
from fedkd.training.evaluation import predict


def evidence_of(
    context: ExperimentContext,
    run: RunDirectory,
    round_number: int,
    bank: Bank,
    student: Network | None,
) -> FitContext:
    """What the rules may look at, of the teachers in `bank`."""
    transfer = context.data.transfer
    validation = None
    if Images.VALIDATION in context.learning_images:
        answers = run.knowledge(round_number, Images.VALIDATION)
        if answers.clients():
            clients = {teacher.number for teacher in bank.teachers}
            validation = answers.bank(context.prediction_kinds).only(clients)
    looks = student is not None and any(rule.needs_student for rule in context.fusion)
    return FitContext(
        bank,
        labels=transfer.images.labels if transfer.labelled else None,
        validation=validation,
        validation_labels=context.data.validation.labels,
        student=predict(student, transfer.images.images) if student and looks else None,
        seed=stream_seed(context.experiment.seed, "fuse", round_number),
        device="cpu" if student is None else student.mean.device,
    )
