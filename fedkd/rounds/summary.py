"""What a run comes to: student, teachers, ensemble, oracle, ceiling, bytes, seconds."""

from __future__ import annotations

from dataclasses import asdict
from typing import cast

from fedkd.build import build_optimizer, local_training
from fedkd.data.images import ImageSet
from fedkd.models.network import parameter_count
from fedkd.randomness import stream_seed
from fedkd.rounds import Server
from fedkd.rounds.costs import costs_of
from fedkd.runs.directory import network_hash
from fedkd.runs.events import (
    ClientEvaluated,
    MessageCounted,
    ReplyRefused,
    RoundFinished,
    holdout_accuracies,
    seconds_by_phase,
)
from fedkd.runs.privacy_statement import statement, write_statement
from fedkd.runs.results import (
    LISTED,
    DetectionRecord,
    RefusedRecord,
    ScoresRecord,
    StudentRecord,
    Summary,
    Traffic,
    listed,
)
from fedkd.training.evaluation import evaluate
from fedkd.training.supervised import fit


def summarise(server: Server, *, seconds: float, clients_here: bool = True) -> Summary:
    """Everything the final table shows, as plain values.

    Trains the baselines named in `evaluation.baselines`; they are measures, not part of the
    federation: they use labels and private images that a real server never sees.

    Args:
        server: After its last round.
        seconds: That the run took, in all sessions.
        clients_here: Whether its clients worked on this machine.
    """
    run, experiment, data = server.run, server.experiment, server.context.data
    rounds = run.events(RoundFinished)
    last = rounds[-1]
    best = max(rounds, key=lambda event: event.student.accuracy)
    holdouts = holdout_accuracies(run.events(ClientEvaluated))
    counts, messages = data.class_counts(), run.messages()
    summary: Summary = {
        "name": experiment.name,
        "seed": experiment.seed,
        "rounds": len(rounds),
        "hash": network_hash(server.student),
        "classes": list(data.classes),
        "transfer": {
            "size": len(data.transfer.images),
            "labelled": data.transfer.labelled,
            "fingerprint": data.fingerprint,
            "bytes": data.transfer.images.images.numel(),
        },
        "test": {"size": len(data.test)},
        "student": cast(
            StudentRecord,
            {
                "model": experiment.student.model.name,
                "parameters": parameter_count(server.student),
                "best_accuracy": best.student.accuracy,
                "best_round": best.round,
                **asdict(last.student),
            },
        ),
        "teachers": [
            {
                "client": client,
                "model": experiment.teachers.model_of(client).name,
                "examples": None if experiment.promises else int(counts[client].sum()),
                "accuracy": last.teachers.get(client),
                "student_on_holdout": holdouts.get(client),
            }
            for client in listed(experiment.clients, (message.client for message in messages))
        ],
        "ensemble": None if last.ensemble is None else cast(ScoresRecord, asdict(last.ensemble)),
        "pseudo_labels": last.pseudo_labels,
        "worst_client": min(holdouts.values(), default=None),
        "degraded_rounds": [event.round for event in rounds if event.status != "ok"],
        "refused": [cast(RefusedRecord, asdict(event)) for event in run.events(ReplyRefused)],
        "bytes": bytes_by_phase(messages),
        "seconds": seconds_by_phase(rounds) | {"total": seconds},
        "costs": costs_of(server.context, rounds, clients_here=clients_here),
    }
    if last.detection:
        summary["detection"] = {
            who: cast(DetectionRecord, asdict(found)) for who, found in last.detection.items()
        }
        summary["detection_on_holdout"] = {
            str(event.client): {
                "balanced_accuracy": event.balanced_accuracy,
                "auc": event.auc,
                "sensitivity": event.sensitivity,
            }
            for event in run.events(ClientEvaluated)
            if event.balanced_accuracy is not None
        }
    if last.heads:
        summary["heads"] = last.heads
    if not experiment.promises and experiment.clients <= LISTED:
        summary["class_counts"] = counts.tolist()
        if (wrong := data.wrong_labels()) is not None:
            summary["wrong_labels"] = wrong
    privacy = statement(run)
    if privacy is not None:
        summary["privacy"] = privacy
        write_statement(run)
    for name in experiment.evaluation.baselines:
        server.notify("phase", round=None, phase=name)
        summary[name] = _baseline(server, name)
    return summary


def bytes_by_phase(messages: list[MessageCounted]) -> dict[str, Traffic]:
    """Bytes up and down per phase, summed over clients and rounds."""
    totals: dict[str, Traffic] = {}
    for message in messages:
        phase = totals.setdefault(message.phase, {"down": 0, "up": 0})
        phase["down"] += message.down
        phase["up"] += message.up
    return totals


def _baseline(server: Server, name: str) -> float | None:
    """Test accuracy of the same student trained on labels: `oracle` or `ceiling`.

    Oracle: on the transfer set's true labels, for as many epochs as the student saw it.
    Ceiling: on all private images in one place, for as many epochs as each teacher saw its own.
    """
    experiment, data = server.experiment, server.context.data
    options = local_training(experiment.teachers)
    if name == "oracle":
        hidden = data.transfer.true_labels
        if hidden is None:  # a transfer set with other classes has no right answers
            return None
        images = ImageSet(data.transfer.images.images, hidden, data.classes)
        recipe = experiment.distillation
        options["epochs"], options["batch_size"] = recipe.epochs, recipe.batch_size
        options["optimizer"] = build_optimizer(recipe.optimizer)
    else:
        images = data.pooled()
    options["epochs"] *= experiment.rounds
    network = server.context.network(experiment.student.model, "student")
    network.to(server.student.mean.device)
    fit(network, images, **options, seed=stream_seed(experiment.seed, "baseline", name))
    return evaluate(network, data.test)
