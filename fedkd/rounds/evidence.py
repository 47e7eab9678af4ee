"""What fusion rules may look at when they are fitted to a round's teachers."""

from __future__ import annotations

from fedkd.fusion.base import FitContext
from fedkd.knowledge.payload import Bank
from fedkd.knowledge.query import Images
from fedkd.models.network import Network
from fedkd.randomness import stream_seed
from fedkd.rounds.context import ExperimentContext
from fedkd.rounds.server_teachers import server_teachers_of
from fedkd.rounds.stale import Sources, aged, collect
from fedkd.runs.directory import RunDirectory
from fedkd.training.evaluation import predict


def evidence_of(
    context: ExperimentContext,
    run: RunDirectory,
    round_number: int,
    bank: Bank,
    student: Network | None,
    rounds: Sources | None = None,
) -> FitContext:
    """What the rules may look at: of the teachers in `bank`, and of the server's own.

    Args:
        context: Of the run.
        run: Holds their answers.
        round_number: The round that is fused.
        bank: The clients' answers about the transfer images.
        student: As it was before the round.
        rounds: Whose answers of which round those are; None: all of this round.
    """
    transfer = context.data.transfer
    server = server_teachers_of(context)
    validation = None
    asked = Images.VALIDATION in context.learning_images
    clients = [teacher.number for teacher in bank.teachers]
    own = {client: (rounds or {}).get(client, round_number) for client in clients}
    if asked and any(run.knowledge(n, Images.VALIDATION).clients() for n in set(own.values())):
        validation = collect(run, Images.VALIDATION, context.prediction_kinds, own)
        validation = aged(validation, context, own)
        validation = server.beside(validation, Images.VALIDATION, round_number)
    bank = server.beside(bank, Images.TRANSFER, round_number)
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
