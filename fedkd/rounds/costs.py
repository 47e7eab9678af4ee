"""What a run has taken: of its networks, and of the machine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any, cast

from fedkd.config import Component, Energy
from fedkd.io.meters import counters
from fedkd.models.costs import size_of
from fedkd.rounds.context import ExperimentContext
from fedkd.runs.events import RoundFinished
from fedkd.runs.results import CostsRecord, NetworkRecord, SpentRecord

TEACHERS, STUDENT = ("train", "knowledge"), ("fuse", "distil")
"""Phases in which they work."""


def costs_of(
    context: ExperimentContext, rounds: Sequence[RoundFinished], *, clients_here: bool
) -> CostsRecord:
    """Networks, time, memory and energy of a run's rounds; what only measures it is not counted.

    Args:
        context: Of the run.
        rounds: Its finished rounds.
        clients_here: Whether clients work on this machine; of others nothing is known but how long
            they were waited for.
    """
    experiment = context.experiment
    phases = {phase for event in rounds for phase in event.seconds}
    record: CostsRecord = {
        "networks": _networks(context),
        "teachers": {"seconds": _seconds(rounds, TEACHERS)},
        "student": {"seconds": _seconds(rounds, STUDENT)},
        "run": {"seconds": _seconds(rounds, phases)},
    }
    options = experiment.resources.energy
    counted = all(event.joules.keys() >= event.seconds.keys() for event in rounds)
    gpus = experiment.resources.client_gpus > 0 or any(event.gpu_memory for event in rounds)
    record["energy"] = energy_source(options, counted, gpus=gpus)
    _add(record["student"], rounds, STUDENT, options, counted)
    if clients_here:
        _add(record["teachers"], rounds, TEACHERS, options, counted)
        _add(record["run"], rounds, phases, options, counted)
        # The server's GPU is not the teachers'.
        record["teachers"].pop("gpu_memory", None)
    return record


def energy_source(options: Energy, counted: bool, *, gpus: bool) -> str | None:
    """How joules are known; None where they are not.

    Args:
        options: Of the config.
        counted: Whether the machine counted them all the time.
        gpus: Whether GPUs worked.
    """
    if counted:
        return f"measured by {' and '.join(counters(gpus)) or 'the machine'}"
    return None if options.watts is None else f"assumed at {options.watts:g} W"


def with_energy(spent: dict[str, Any] | SpentRecord, joules: float | None, options: Energy) -> None:
    """Add joules to what was spent: those that were counted, else by the assumed draw."""
    if joules is None and options.watts is not None:
        joules = spent["seconds"] * options.watts
    spent["joules"] = joules
    if joules is None:
        return
    if options.grams_per_kwh is not None:
        spent["grams"] = joules / 3.6e6 * options.grams_per_kwh


def _seconds(rounds: Sequence[RoundFinished], phases: Collection[str]) -> float:
    return sum(event.seconds.get(phase, 0.0) for event in rounds for phase in phases)


def _add(
    spent: SpentRecord,
    rounds: Sequence[RoundFinished],
    phases: Collection[str],
    options: Energy,
    counted: bool,
) -> None:
    joules = sum(event.joules.get(phase, 0.0) for event in rounds for phase in phases)
    with_energy(spent, joules if counted else None, options)
    peaks = [peak for event in rounds for phase, peak in event.memory.items() if phase in phases]
    gpu = [peak for event in rounds for phase, peak in event.gpu_memory.items() if phase in phases]
    if peaks:
        spent["memory"] = max(peaks)
    if gpu:
        spent["gpu_memory"] = max(gpu)


def _networks(context: ExperimentContext) -> list[NetworkRecord]:
    experiment, data = context.experiment, context.data
    seen_by = data.seen_by or (None,) * experiment.clients
    teachers = [(experiment.teachers.model_of(n), seen) for n, seen in enumerate(seen_by)]
    found: list[tuple[tuple[object, ...], Component, int, Sequence[int]]] = []
    for (model, seen), count in Counter(teachers).items():
        if seen is None or seen in data.sides:  # else the images are on other machines
            client = teachers.index((model, seen))
            found.append((("teacher", client), model, count, data.of(client).test.shape))
    for model in experiment.distillation.assistants:
        found.append((("assistant",), model, 1, data.test.shape))
    found.append((("student",), experiment.student.model, 1, data.test.shape))
    records: list[NetworkRecord] = []
    for names, model, count, shape in found:
        size = size_of(context.network(model, *names), shape)
        about = {"role": names[0], "model": model.name, "count": count, **size.facts}
        records.append(cast(NetworkRecord, about))
    return records
