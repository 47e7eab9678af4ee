"""How a finished round's student and teachers see the transfer set, beside each other.

Reads the knowledge that lies on disk, a few thousand samples of it, and never all of it: a report
must not need more memory than the run did.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedkd.data.splits import FederatedData
from fedkd.knowledge.kinds import Logits
from fedkd.knowledge.payload import Bank
from fedkd.runs.directory import RunDirectory
from fedkd.runs.export import load_student
from fedkd.training.evaluation import agreement, predict

SAMPLES = 2000  # of the transfer set, evenly spaced
TEACHERS = 100  # in the agreement matrix; more cannot be distinguished
VERTICES = 120  # of the inter-sample graph
CLASSES = 100  # of the inter-class graph
_FLOATS = 2**26  # held at once, however many teachers and classes


@dataclass(frozen=True)
class Graphs:
    """Relation graphs of the student and of the fused teachers.

    Edges are cosines of z-scored logits: VRM itself compares the unit-length differences of two
    vertices, which are vectors and cannot be drawn; the cosine shows the same neighbourhoods.

    Attributes:
        classes: Class numbers that are vertices of the inter-class graph.
        class_student: Inter-class edges (V, V), correlations over samples.
        class_teachers: Likewise.
        blocks: Class number and count of each run of vertices in the inter-sample graph.
        sample_student: Inter-sample edges (V, V), cosines over classes.
        sample_teachers: Likewise.
    """

    classes: list[int]
    class_student: np.ndarray
    class_teachers: np.ndarray
    blocks: list[tuple[int, int]]
    sample_student: np.ndarray
    sample_teachers: np.ndarray


@dataclass(frozen=True)
class Relations:
    """What one round's knowledge shows.

    Attributes:
        round: Which round.
        samples: Transfer samples looked at.
        total: Transfer samples there are.
        names: Rows of `agreement`: clients, then `ensemble`, then `student` if it is known.
        teachers: How many of the rows are teachers.
        of: How many teachers answered.
        agreement: Share of samples on which two of them name the same class.
        graphs: None without the student's predictions.
        problem: Why there are no graphs.
    """

    round: int
    samples: int
    total: int
    names: list[str]
    teachers: int
    of: int
    agreement: np.ndarray
    graphs: Graphs | None
    problem: str | None


def relations(run: RunDirectory, data: FederatedData | None, rounds: list[int]) -> Relations | None:
    """Relations in the last of `rounds` (finished ones) whose knowledge is still on disk.

    A round that has not finished must not be named: its store is still written to.

    Raises:
        OSError: knowledge is unreadable or has no logits.
        ValueError: the run's fusion cannot be built or applied.
        RuntimeError: likewise, or the student cannot be loaded.
    """
    for number in reversed(rounds):
        folder = run.path / "knowledge" / f"round-{number:04d}" / "transfer"
        if any(folder.glob("client-*")):
            break
    else:
        return None
    store = run.knowledge(number)
    bank = store.bank((Logits(),))
    if any(teacher.knows is not None for teacher in bank.teachers):
        return None  # relations among the classes of a few, beside those of all
    total = bank.num_samples
    rows = _spread(total, min(SAMPLES, max(1, _FLOATS // _floats_per_sample(bank))))
    # A memory map is read row by row: only these rows ever leave the disk.
    logits = [np.asarray(array[rows], dtype=np.float32) for array in bank.arrays[Logits()]]
    together = torch.from_numpy(store.fused("probabilities")[rows])
    # Saturated teachers give probability 0; the floor keeps one such class from drowning the rest.
    fused = together.clamp(min=1e-6).log()

    shown = _spread(len(logits), TEACHERS)
    names = [bank.teachers[m].key for m in shown]
    voices = [torch.from_numpy(logits[m]) for m in shown]
    student, problem = None, None
    if data is None:
        problem = "the data could not be loaded"
    elif len(data.transfer.images) != total:
        problem = f"the transfer set has {len(data.transfer.images)} images now, then {total}"
    else:
        network = load_student(run, data)
        student = predict(network, data.transfer.images.images[torch.from_numpy(rows)])
    extra = [("ensemble", fused)] + ([("student", student)] if student is not None else [])
    return Relations(
        round=number,
        samples=len(rows),
        total=total,
        names=names + [name for name, _ in extra],
        teachers=len(names),
        of=len(logits),
        agreement=agreement([*voices, *(voice for _, voice in extra)]).numpy(),
        graphs=None if student is None else graphs(student, fused),
        problem=problem,
    )


def graphs(student: Tensor, teachers: Tensor) -> Graphs:
    """Relation graphs of two predictors on the same samples, logits (B, C) each."""
    labels = teachers.argmax(dim=1)
    number = teachers.shape[1]
    counts = torch.bincount(labels, minlength=number)
    common = torch.sort(counts, descending=True, stable=True).indices
    classes = sorted(common[:CLASSES].tolist())
    ours, theirs = _zscore(student, 1), _zscore(teachers, 1)

    # Blocks of two samples show nothing: of many classes, the most frequent ones are drawn.
    drawn = sorted(common[: 20 if number > 24 else number].tolist())
    order = torch.cat([torch.nonzero(labels == label).flatten() for label in drawn])
    order = order[torch.from_numpy(_spread(len(order), VERTICES))]
    present = labels[order].tolist()
    return Graphs(
        classes=classes,
        class_student=_class_graph(ours[:, classes]),
        class_teachers=_class_graph(theirs[:, classes]),
        blocks=[(label, present.count(label)) for label in drawn if label in present],
        sample_student=_cosine(ours[order]),
        sample_teachers=_cosine(theirs[order]),
    )


def likeness(first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    """(correlation, mean absolute difference) of the edges of two graphs (V, V), V > 2."""
    upper = np.triu_indices(len(first), k=1)
    a, b = first[upper], second[upper]
    spread = float(a.std() * b.std())
    together = float(((a - a.mean()) * (b - b.mean())).mean())
    return (together / spread if spread > 0 else float("nan")), float(np.abs(a - b).mean())


def _class_graph(scores: Tensor) -> np.ndarray:
    return _cosine(_zscore(scores, 0).T)


def _cosine(vertices: Tensor) -> np.ndarray:
    unit = torch.nn.functional.normalize(vertices, dim=1)
    edges: np.ndarray = (unit @ unit.T).clamp(-1, 1).numpy()
    return edges


def _zscore(logits: Tensor, axis: int) -> Tensor:
    centred = logits.double() - logits.double().mean(dim=axis, keepdim=True)
    return centred / centred.std(dim=axis, keepdim=True, correction=0).clamp(min=1e-9)


def _floats_per_sample(bank: Bank) -> int:
    teachers = bank.arrays[Logits()]
    # agreement compares every pair of the teachers shown
    return max(1, len(teachers) * int(teachers[0].shape[1]), min(len(teachers), TEACHERS) ** 2)


def _spread(total: int, count: int) -> np.ndarray:
    """At most `count` of the numbers below `total`, evenly spaced, in order."""
    if total <= count:
        return np.arange(total)
    return np.linspace(0, total - 1, count).round().astype(np.int64)
