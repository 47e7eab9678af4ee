"""What a run comes to: student, teachers, ensemble, oracle, ceiling, bytes, seconds."""

from __future__ import annotations

from dataclasses import asdict
from typing import cast

import numpy as np
import torch
from torch import Tensor

from fedkd.build import build_optimizer, local_training
from fedkd.data.images import ImageSet
from fedkd.models.network import parameter_count
from fedkd.randomness import stream_seed
from fedkd.rounds import Server
from fedkd.rounds.costs import costs_of
from fedkd.runs.choice import kept_round, validated
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
    TemperatureRecord,
    Traffic,
    listed,
)
from fedkd.training.evaluation import best_temperature, calibration, evaluate, predict
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
    kept = next(e for e in rounds if e.round == kept_round(experiment, validated(rounds)))
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
                **asdict(kept.student),
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
    if (scaled := _temperature(server)) is not None:
        summary["temperature"] = scaled
    if experiment.evaluation.best and kept.validation is not None:
        summary["kept"] = {
            "round": kept.round,
            "validation": kept.validation,
            "images": len(data.validation),
        }
    if last.detection:
        own = {who: found for who, found in kept.detection.items() if who == "student"}
        summary["detection"] = {
            who: cast(DetectionRecord, asdict(found))
            for who, found in {**last.detection, **own}.items()
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


def _temperature(server: Server) -> TemperatureRecord | None:
    """What makes the student's confidence right; no weight moves by it.

    On the validation images where there are some. Else on the transfer images, against the labels
    or the fused answers that it learnt from; under a release these are not what left the teachers,
    so that nothing is done.
    """
    data, experiment = server.context.data, server.experiment
    if data.heads is not None:  # each would want its own
        return None
    if len(data.validation):
        source, images, labels = "validation", data.validation.images, data.validation.labels
    elif experiment.release is not None:
        return None
    else:
        source, images, labels = (
            "transfer",
            data.transfer.images.images,
            data.transfer.images.labels,
        )
        if labels is None:
            labels = _answers(server)
    if labels is None or len(labels) != len(images):
        return None
    value = best_temperature(predict(server.student, images), labels)
    tests = predict(server.student, data.test.images) / value
    assert data.test.labels is not None
    after = asdict(calibration(tests, data.test.labels))
    return {"value": value, "source": source, "images": len(images), "calibration": after}


def _answers(server: Server) -> Tensor | None:
    """The class that the fused teachers of the last round with answers give each transfer image."""
    for event in reversed(server.run.events(RoundFinished)):
        try:
            fused = server.run.knowledge(event.round).fused("probabilities")
        except (OSError, ValueError):
            continue
        return torch.from_numpy(np.array(fused, np.float32)).argmax(dim=1)
    return None


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
