"""Knowledge of one teacher, and of many side by side.

`Knowledge` is what one client sends, `Bank` what the server holds of a round (arrays that may
lie on disk), `Ensemble` the rows of a bank for some samples: what fusions and losses see.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from fedkd.functional.precision import full_precision
from fedkd.knowledge.kinds import Kind, Logits


class Role(StrEnum):
    """What a teacher is."""

    #: A client's network; in central training, one of the given networks.
    CLIENT = "client"
    #: A network of the server, between the teachers and the student.
    ASSISTANT = "assistant"
    #: A network that the server has from a file.
    SERVER = "server"
    #: Several teachers, merged by a fusion rule.
    GROUP = "group"
    #: All teachers, as a private release shows them.
    RELEASE = "release"


@dataclass(frozen=True)
class Teacher:
    """What is known of a teacher besides its answers.

    Attributes:
        number: Among those of its role; a client's is that of its partition, those of the server
            come after all clients.
        num_examples: Private examples it learnt from; None unless a fusion rule asked.
        class_counts: Private examples per class; None unless a fusion rule asked. Discloses the
            client's label distribution.
        parameters: Size of its network, None if unknown. Not sent: the server knows the models.
        role: What it is.
        knows: Which of the C classes it knows, as the experiment declares; None: all. Its network
            answers about these alone.
    """

    number: int
    num_examples: int | None = None
    class_counts: tuple[int, ...] | None = None
    parameters: int | None = None
    role: Role = Role.CLIENT
    knows: tuple[bool, ...] | None = None

    @property
    def key(self) -> str:
        """A name that no other teacher of a run has: the plain number for a client."""
        return str(self.number) if self.role is Role.CLIENT else f"{self.role}-{self.number}"

    def widened(self, logits: np.ndarray) -> np.ndarray:
        """Its logits, (N, classes it knows), among those of all classes: (N, C), -inf elsewhere."""
        if self.knows is None or logits.shape[-1] == len(self.knows):
            return logits
        whole = np.full((*logits.shape[:-1], len(self.knows)), -np.inf, logits.dtype)
        whole[..., np.array(self.knows)] = logits
        return whole


#: All teachers, merged into one by a fusion rule.
AGGREGATE = Teacher(0, role=Role.GROUP)


@dataclass(frozen=True)
class Knowledge:
    """One teacher's answers about a whole set of images, in the set's order.

    Attributes:
        teacher: Whose they are.
        tensors: Kind -> tensor with first axis N (the images), or a fact's tensor.
    """

    teacher: Teacher
    tensors: Mapping[Kind, Tensor]


@dataclass(frozen=True)
class Ensemble:
    """M teachers on the same B samples.

    Attributes:
        teachers: Who they are, in client order.
        tensors: Kind -> (M, B, ...), or M tensors where the teachers' networks differ in shape.
            A fact has no axis B. Logits of classes that a teacher does not know are -inf, which
            says nothing of the sample: rules and losses that are not `partial` never see them.
        weights: Weight of each teacher on each sample, (M, B); columns sum to one.
        class_weights: Weights of each teacher's view of each class, (M, C) in [0, 1]; ones unless
            a fusion rule knows better. Relation losses gate class-graph edges with it.
        voices: How many fresh teachers all of them count for on each sample, (B,); None: M.
    """

    teachers: tuple[Teacher, ...]
    tensors: Mapping[Kind, Tensor | Sequence[Tensor]]
    weights: Tensor
    class_weights: Tensor | None = None
    voices: Tensor | None = None

    @property
    def logits(self) -> Tensor:
        """Every teacher's logits of the real view, (M, B, C)."""
        logits = self.tensors[Logits()]
        assert isinstance(logits, Tensor)
        return logits

    @property
    def known(self) -> Tensor | None:
        """Which classes each teacher knows, bool (M, C); None where all know all."""
        if all(teacher.knows is None for teacher in self.teachers):
            return None
        everything = (True,) * self.logits.shape[-1]
        rows = [everything if who.knows is None else who.knows for who in self.teachers]
        return torch.tensor(rows, device=self.weights.device)

    def __len__(self) -> int:
        return len(self.teachers)

    @property
    def num_samples(self) -> int:
        """B."""
        return self.weights.shape[1]

    def weighted(self, scores: Tensor) -> Ensemble:
        """Multiply the weights by non-negative `scores` (M, B) and normalise per sample.

        A sample on which every score is zero keeps the weights it had.
        """
        weights = self.weights * scores
        total = weights.sum(dim=0)
        return replace(
            self, weights=torch.where(total > 0, weights / total.clamp(min=1e-30), self.weights)
        )

    @full_precision
    def mean_probabilities(self, temperature: float = 1.0) -> Tensor:
        """Weighted mean of the teachers' probabilities on the real view, (B, C).

        Where they know different classes, that of those who know a class (`union`).
        """
        probabilities = torch.softmax(self.logits.float() / temperature, dim=-1)
        if (known := self.known) is not None:
            return union(probabilities, self.weights, known)
        return torch.einsum("mb,mbc->bc", self.weights, probabilities)

    def among(self, span: slice) -> Ensemble:
        """The teachers that know all of some classes, as if there were no others; maybe nobody."""
        chosen = [
            m for m, who in enumerate(self.teachers) if who.knows is None or all(who.knows[span])
        ]
        tensors: dict[Kind, Tensor | Sequence[Tensor]] = {}
        for kind, parts in self.tensors.items():
            own = parts[chosen] if isinstance(parts, Tensor) else [parts[m] for m in chosen]
            if kind.logits:
                own = own[..., span] if isinstance(own, Tensor) else [o[..., span] for o in own]
            tensors[kind] = own
        weights = self.weights[chosen]
        total = weights.sum(dim=0)
        weights = torch.where(total > 0, weights / total.clamp(min=1e-30), 1 / max(1, len(chosen)))
        classes = None if self.class_weights is None else self.class_weights[chosen][:, span]
        teachers = tuple(replace(self.teachers[m], knows=None) for m in chosen)
        return Ensemble(teachers, tensors, weights, classes)

    def rows(self, index: Tensor) -> Ensemble:
        """The same teachers on some of the samples."""
        tensors: dict[Kind, Tensor | Sequence[Tensor]] = {
            kind: [part[index] for part in parts] if kind.per_sample else parts
            for kind, parts in self.tensors.items()
        }
        tensors[Logits()] = self.logits[:, index]
        voices = None if self.voices is None else self.voices[index]
        return replace(self, tensors=tensors, weights=self.weights[:, index], voices=voices)

    def at(self, index: Tensor) -> Ensemble:
        """As `Bank.rows` gives them: the same teachers on some samples, shape for shape."""
        tensors: dict[Kind, Tensor | Sequence[Tensor]] = {}
        for kind, parts in self.tensors.items():
            if not kind.per_sample:
                tensors[kind] = parts
            elif isinstance(parts, Tensor):
                tensors[kind] = parts[:, index]
            else:
                tensors[kind] = [part[index] for part in parts]
        return replace(self, tensors=tensors, weights=self.weights[:, index])

    def teacher(self, index: int) -> dict[Kind, Tensor]:
        """Tensors of one teacher, Kind -> (B, ...)."""
        return {kind: tensor[index] for kind, tensor in self.tensors.items()}


@dataclass(frozen=True)
class Bank:
    """The knowledge of M teachers about all N transfer samples, possibly on disk.

    Attributes:
        teachers: In client order, so that nothing depends on the order of arrival.
        arrays: Kind -> one array (N, ...) per teacher, for facts without N; memory maps are read
            row by row.
        weights: (M, N) after fusion; None means uniform.
        class_weights: (M, C) after fusion, or None.
        decay: What is left of each answer's weight by its age, (M, N) in [0, 1], before fusion;
            None: all are of one age.
    """

    teachers: tuple[Teacher, ...]
    arrays: Mapping[Kind, Sequence[np.ndarray]]
    weights: np.ndarray | None = None
    class_weights: Tensor | None = field(default=None)
    decay: np.ndarray | None = None

    def __post_init__(self) -> None:
        for kind, arrays in self.arrays.items():
            if len(arrays) != len(self.teachers):
                raise ValueError(f"{len(self.teachers)} teachers, but {len(arrays)} give {kind}")
            lengths = sorted({len(array) for array in arrays}) if kind.per_sample else []
            if kind.per_sample and lengths != [self.num_samples]:
                raise ValueError(
                    f"teachers answer about {self.num_samples} images, their {kind} are about "
                    f"{lengths}"
                )
        expected = len(self.teachers), self.num_samples
        if self.weights is not None and self.weights.shape != expected:
            raise ValueError(
                f"weights of {expected[0]} teachers on {expected[1]} images expected, "
                f"got {self.weights.shape}"
            )

    def only(self, clients: Collection[int]) -> Bank:
        """The same knowledge of some clients, and of the server's own teachers, before fusion."""
        kept = [
            n
            for n, teacher in enumerate(self.teachers)
            if teacher.role is Role.SERVER
            or (teacher.role is Role.CLIENT and teacher.number in clients)
        ]
        return Bank(
            tuple(self.teachers[n] for n in kept),
            {kind: [arrays[n] for n in kept] for kind, arrays in self.arrays.items()},
            decay=None if self.decay is None else self.decay[kept],
        )

    def beside(self, other: Bank) -> Bank:
        """The knowledge of both, before fusion, in client order."""
        teachers = (*self.teachers, *other.teachers)
        order = sorted(range(len(teachers)), key=lambda n: teachers[n].number)
        together = {kind: [*arrays, *other.arrays[kind]] for kind, arrays in self.arrays.items()}
        decay = None
        if self.decay is not None or other.decay is not None:
            each = [
                np.ones((len(bank.teachers), self.num_samples), np.float32)
                if bank.decay is None
                else bank.decay
                for bank in (self, other)
            ]
            decay = np.concatenate(each)[order]
        return Bank(
            tuple(teachers[n] for n in order),
            {kind: [arrays[n] for n in order] for kind, arrays in together.items()},
            decay=decay,
        )

    @classmethod
    def of(cls, knowledge: Sequence[Knowledge]) -> Bank:
        """Bank of knowledge held in memory.

        Raises:
            ValueError: there is no teacher, teachers differ in kinds, or one's answers are not
                finite.
        """
        ordered = sorted(knowledge, key=lambda item: item.teacher.number)
        if not ordered:
            raise ValueError("no teacher has shared anything")
        kinds = set(ordered[0].tensors)
        for item in ordered:
            if set(item.tensors) != kinds:
                raise ValueError(
                    f"client {item.teacher.number} shares {sorted(map(str, item.tensors))}, "
                    f"expected {sorted(map(str, kinds))}"
                )
            for kind, tensor in item.tensors.items():
                if (problem := _not_finite(item.teacher, kind, tensor)) is not None:
                    raise ValueError(problem)
        arrays = {
            k: [item.tensors[k].cpu().numpy() for item in ordered] for k in ordered[0].tensors
        }
        return cls(tuple(item.teacher for item in ordered), arrays)

    @property
    def num_samples(self) -> int:
        """N."""
        return next(len(arrays[0]) for kind, arrays in self.arrays.items() if kind.per_sample)

    @property
    def num_classes(self) -> int:
        """C, of which a teacher may know a part."""
        knows, logits = self.teachers[0].knows, self.arrays[Logits()][0]
        return logits.shape[1] if knows is None else len(knows)

    @property
    def fusible(self) -> tuple[Kind, ...]:
        """Kinds that fusion rules see: one entry per sample, of the same shape for every teacher.

        Feature maps would fill the memory for nothing, and those of different networks cannot
        be averaged.
        """
        return tuple(kind for kind in self.arrays if kind.fusible)

    def rows(
        self,
        index: Tensor | slice,
        device: torch.device | str = "cpu",
        kinds: Collection[Kind] | None = None,
    ) -> Ensemble:
        """The ensemble on samples `index` (B,), as float32 tensors on `device`.

        Args:
            index: Which samples; a slice from start to stop is read fastest.
            device: Where to.
            kinds: What to read; None reads everything.
        """
        at = index if isinstance(index, slice) else index.cpu().numpy()
        tensors: dict[Kind, Tensor | Sequence[Tensor]] = {}
        for kind, arrays in self.arrays.items():
            if kinds is not None and kind not in kinds:
                continue
            parts = [np.asarray(a[at] if kind.per_sample else a) for a in arrays]
            if kind.logits:
                parts = [who.widened(part) for who, part in zip(self.teachers, parts)]
            if {part.dtype for part in parts} != {np.dtype(np.float16)}:  # which travels as it is
                parts = [part.astype(np.float32, copy=False) for part in parts]
            if len({part.shape for part in parts}) == 1:
                tensors[kind] = torch.from_numpy(np.stack(parts)).to(device).float()
            else:
                own = [part if part.flags.writeable else part.copy() for part in parts]
                tensors[kind] = [torch.from_numpy(part).to(device).float() for part in own]
        count = len(self.teachers)
        voices = None
        if self.weights is not None:
            weights = torch.from_numpy(np.ascontiguousarray(self.weights[:, at]))
        elif self.decay is not None:
            left = torch.from_numpy(np.ascontiguousarray(self.decay[:, at])).to(device)
            voices = left.sum(dim=0)
            weights = left / voices
        else:
            some = len(range(self.num_samples)[at]) if isinstance(at, slice) else len(at)
            weights = torch.full((count, some), 1.0 / count)
        classes = None if self.class_weights is None else self.class_weights.to(device)
        return Ensemble(self.teachers, tensors, weights.to(device), classes, voices)


@dataclass(frozen=True)
class Fused:
    """A bank after fusion, with the answers of all teachers together.

    Made by `fuse`, by `Fused.of`, or from another one, so that what belongs to the same images
    stays together.

    Attributes:
        bank: The fused teachers (weights set; fewer teachers if a rule merged them).
        probabilities: Weighted mean of the teachers' probabilities, (N, C) float32.
        targets: Labels the student learns from, (N,): the true ones of a labelled transfer set,
            else the argmax of `probabilities`.
        index: Transfer images that all this is about, (N,); None is the whole set.

    Raises:
        ValueError: its parts are about different numbers of images.
    """

    bank: Bank
    probabilities: Tensor
    targets: Tensor
    index: Tensor | None = None

    def __post_init__(self) -> None:
        parts = {"probabilities": self.probabilities, "targets": self.targets, "index": self.index}
        for name, part in parts.items():
            if part is not None and len(part) != len(self):
                raise ValueError(
                    f"fused.{name}: the teachers have answered about {len(self)} images, here are "
                    f"{len(part)}"
                )

    def __len__(self) -> int:
        """N."""
        return self.bank.num_samples

    @classmethod
    def of(
        cls,
        teacher: Teacher,
        logits: Tensor,
        *,
        probabilities: Tensor | None = None,
        targets: Tensor | None = None,
        index: Tensor | None = None,
    ) -> Fused:
        """One teacher alone, by its logits (N, C).

        Args:
            teacher: The teacher.
            logits: Its logits.
            probabilities: Default: their softmax.
            targets: Default: the most probable classes.
            index: As in the class.
        """
        joint = torch.softmax(logits.float(), dim=-1) if probabilities is None else probabilities
        targets = joint.argmax(dim=1) if targets is None else targets
        return cls(Bank((teacher,), {Logits(): [logits.numpy()]}), joint, targets, index)

    def replaced_by(self, knowledge: Knowledge) -> Fused:
        """Another teacher alone, about the same images; the targets stay."""
        arrays = {kind: [tensor.numpy()] for kind, tensor in knowledge.tensors.items()}
        bank = Bank((knowledge.teacher,), arrays)
        return replace(self, bank=bank, probabilities=_probabilities(knowledge))

    def with_teacher(self, knowledge: Knowledge, share: float) -> Fused:
        """One more teacher with a share of the weight; all others keep their proportions.

        The targets stay.

        Args:
            knowledge: Its answers about the same images.
            share: Its weight on each image, in [0, 1).
        """
        bank = self.bank
        # What only fusion rules read (the server has no private images) has done its part.
        together = {
            kind: [*bank.arrays[kind], tensor.numpy()] for kind, tensor in knowledge.tensors.items()
        }
        count = len(bank.teachers)
        before = np.full((count, len(self)), 1 / count) if bank.weights is None else bank.weights
        weights = np.concatenate([before * (1 - share), np.full((1, len(self)), share)])
        classes = bank.class_weights
        if classes is not None:
            classes = torch.cat([classes, torch.ones(1, classes.shape[1])])
        teachers = (*bank.teachers, knowledge.teacher)
        return replace(
            self,
            bank=Bank(teachers, together, weights.astype(np.float32), classes),
            probabilities=self.probabilities * (1 - share) + _probabilities(knowledge) * share,
        )

    @cached_property
    def shares(self) -> dict[int, float]:
        """Client -> its mean weight over the images. Empty if rules merged all.

        They sum to one, less what the server's own teachers have.
        """
        return self._shares_of(Role.CLIENT)

    @cached_property
    def server_shares(self) -> dict[int, float]:
        """The same of the server's own teachers."""
        return self._shares_of(Role.SERVER)

    def _shares_of(self, role: Role) -> dict[int, float]:
        weights, teachers = self.bank.weights, self.bank.teachers
        if weights is None or any(t.role not in (Role.CLIENT, Role.SERVER) for t in teachers):
            return {}
        rows = zip(teachers, weights, strict=True)
        return {t.number: float(row.mean()) for t, row in rows if t.role is role}


def union(
    probabilities: Tensor, weights: Tensor, known: Tensor, sizes: Tensor | None = None
) -> Tensor:
    """What teachers of different classes say together: `p[c] ~ sum_k w_k n_k q_k[c] / sum_k n_k`.

    Both sums are over the teachers that know class c: a class is not likelier because more
    teachers know it, and one that a teacher does not know is not made unlikely by it.

    Args:
        probabilities: Each teacher's, 0 for what it does not know, (M, B, C).
        weights: Whether the sample is one of its own, (M, B).
        known: Which classes each knows, (M, C).
        sizes: How many examples each has learnt from, (M,); None: as many.

    Returns:
        (B, C), rows sum to one; a class that nobody knows has 0.
    """
    holders = known.to(weights)
    if sizes is not None:
        weights, holders = weights * sizes[:, None], holders * sizes[:, None]
    votes = torch.einsum("mb,mbc->bc", weights, probabilities) / holders.sum(0).clamp(min=1e-30)
    return votes / votes.sum(dim=1, keepdim=True).clamp(min=1e-30)


def not_finite(ensemble: Ensemble) -> str | None:
    """Which teacher gives numbers that are not finite, in one line; None if all are."""
    for kind, parts in ensemble.tensors.items():
        for teacher, part in zip(ensemble.teachers, parts):
            if (problem := _not_finite(teacher, kind, part)) is not None:
                return problem
    if not ensemble.weights.isfinite().all():
        return "the weights that fusion gave the teachers are not finite"
    return None


def _not_finite(teacher: Teacher, kind: Kind, values: Tensor) -> str | None:
    wrong = ~values.isfinite()
    if teacher.knows is not None and kind.logits and values.shape[-1] == len(teacher.knows):
        wrong &= torch.tensor(teacher.knows, device=wrong.device)
    if not wrong.any():
        return None
    first = wrong.nonzero()[0].tolist()
    where = f" for image {first[0]} of this batch or set" if kind.per_sample else ""
    value = float(values[tuple(first)])
    return (
        f"teacher {teacher.key} gives {value} as {kind}{where}: its answers must be finite; "
        "look at its weights and its training, or leave it out"
    )


def _probabilities(knowledge: Knowledge) -> Tensor:
    return torch.softmax(knowledge.tensors[Logits()].float(), dim=-1)


Rule = Callable[[Ensemble], Ensemble]

# Bytes of teachers' tensors held at once while fusing: memory stays flat however many clients.
FUSION_BUDGET = 64 * 2**20


def fuse(
    bank: Bank,
    rules: Sequence[Rule],
    *,
    labels: Tensor | None = None,
    store: Callable[[str, tuple[int, ...]], np.ndarray] | None = None,
    device: torch.device | str = "cpu",
) -> Fused:
    """Apply fusion rules to a whole bank, some samples at a time.

    Rules see each sample on its own, so the result does not depend on how samples are grouped.
    They see predictions and what else is `Bank.fusible`.

    Args:
        bank: Every teacher's knowledge.
        rules: Applied in order; each maps an ensemble to an ensemble.
        labels: True labels (N,) of a labelled transfer set.
        store: `(name, shape) -> float32 array` to hold the results; memory by default, memory
            maps on the server.
        device: Where the rules compute; what they read and leave stays where it is.

    Raises:
        ValueError: what comes out is not finite; the message names whose fault it is.
    """
    allocate = store or (lambda _name, shape: np.zeros(shape, dtype=np.float32))
    total = bank.num_samples
    visible = bank.fusible
    per_sample = sum(
        4 * len(bank.arrays[kind]) * int(np.prod(bank.arrays[kind][0].shape[1:]))
        for kind in visible
    )
    step = max(1, min(total, FUSION_BUDGET // max(per_sample, 1)))
    weights: np.ndarray | None = None
    merged: dict[Kind, np.ndarray] = {}
    classes = bank.num_classes
    together = torch.from_numpy(allocate("probabilities", (total, classes)))
    teachers, class_weights = bank.teachers, bank.class_weights
    for start in range(0, total, step):
        here = slice(start, min(start + step, total))
        before = bank.rows(here, device, kinds=visible)
        after = before
        for rule in rules:
            after = rule(after)
        changed = {
            kind: tensor
            for kind, tensor in after.tensors.items()
            if isinstance(tensor, Tensor) and tensor is not before.tensors.get(kind)
        }
        if weights is None:
            teachers = after.teachers
            class_weights = None if after.class_weights is None else after.class_weights.cpu()
            weights = allocate("weights", (len(after), total))
            merged = {
                kind: allocate(str(kind), (len(after), total, *tensor.shape[2:]))
                for kind, tensor in changed.items()
            }
        weights[:, here] = after.weights.cpu().numpy()
        for kind, tensor in changed.items():
            merged[kind][:, here] = tensor.cpu().numpy()
        together[here] = after.mean_probabilities().cpu()
        if not together[here].isfinite().all():
            raise ValueError(
                not_finite(before)
                or "fusion: the rules gave probabilities that are not finite, though every "
                "teacher's answers are"
            )
    # Teachers that were merged have nothing in common but what was merged with them.
    kept = bank.arrays if len(teachers) == len(bank.teachers) else {}
    arrays = {**kept, **{kind: list(array) for kind, array in merged.items()}}
    targets = together.argmax(dim=1) if labels is None else labels
    return Fused(Bank(teachers, arrays, weights, class_weights), together, targets)
