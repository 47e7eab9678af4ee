"""Heads: several tasks of one student, each with classes of its own.

A task names anew what the data set's classes are: the digits themselves, or whether they are even.
The classes of all tasks stand in one list, in which a head is a slice: a student has a logit for
each of them, a teacher of one task knows those of its slice.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from fedkd.data.images import ImageSet
from fedkd.data.labels import listed
from fedkd.io.text import nearest

Tasks = Mapping[str, Literal["classes", "column"] | Mapping[str, Sequence[int | str]]]
"""Head -> `classes`, those of the data set; `column`, those of its column of labels of that name;
or its own: name -> classes of the data set."""


@dataclass(frozen=True)
class Heads:
    """The tasks of a student.

    Attributes:
        names: In order.
        own: The names of each head's classes.
        table: Which of a head's classes each class of the data set is, int64 (classes, heads).
    """

    names: tuple[str, ...]
    own: tuple[tuple[str, ...], ...]
    table: Tensor

    @classmethod
    def of(cls, tasks: Tasks, classes: Sequence[str], what: str = "heads") -> Heads:
        """The heads over a data set's classes.

        Args:
            tasks: As in the config.
            classes: Of the data set.
            what: Names them in errors.

        Raises:
            ValueError: a head leaves a class out, names it twice or does not know it.
        """
        columns, own = [], []
        for head, task in tasks.items():
            task = _of_column(head, classes, f"{what}.{head}") if task == "column" else task
            if isinstance(task, str):
                columns.append(torch.arange(len(classes)))
                own.append(tuple(classes))
            else:
                columns.append(_column(task, classes, f"{what}.{head}"))
                own.append(tuple(task))
        return cls(tuple(tasks), tuple(own), torch.stack(columns, dim=1))

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """The classes of all heads, one after the other."""
        pairs = zip(self.names, self.own, strict=True)
        return tuple(f"{head}: {name}" for head, names in pairs for name in names)

    @cached_property
    def sizes(self) -> dict[str, int]:
        """How many classes each head has."""
        return {name: len(own) for name, own in zip(self.names, self.own, strict=True)}

    @cached_property
    def spans(self) -> dict[str, slice]:
        """Where each head's classes are in the list."""
        return spans(self.sizes)

    def knows(self, head: str) -> tuple[bool, ...]:
        """Which of all classes are a head's."""
        span = self.spans[head]
        return tuple(span.start <= place < span.stop for place in range(len(self.classes)))

    def targets(self, labels: Tensor) -> Tensor:
        """Labels of the data set (N,) -> each head's class, counted within it, (N, heads)."""
        return self.table.to(labels.device)[labels]

    def named(self, probabilities: Tensor) -> Tensor:
        """The most probable class of each head, as `targets`, of probabilities (N, C)."""
        return torch.stack([probabilities[:, s].argmax(dim=1) for s in self.spans.values()], dim=1)

    def labelled(self, images: ImageSet, head: str) -> ImageSet:
        """The same images, labelled by place in the list of all classes, as one head has it."""
        start, column = self.spans[head].start, self.table[:, self.names.index(head)]
        labels, true = images.labels, images.true_labels
        return ImageSet(
            images.images,
            None if labels is None else start + column[labels],
            self.classes,
            None if true is None else start + column[true],
            images.groups,
        )

    def questions(
        self, logits: Tensor, labels: Tensor, only: Collection[str] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Every image once for each head: its logits among all others -inf, and the right place.

        Args:
            logits: Of all classes, (N, C).
            labels: Of the data set, (N,).
            only: Some heads; None: all.

        Returns:
            (heads x N, C) and (heads x N,), ready for whatever judges one answer to an image.
        """
        rows, right, targets = [], [], self.targets(labels)
        for number, (head, span) in enumerate(self.spans.items()):
            if only is None or head in only:
                row = torch.full_like(logits, -torch.inf)
                row[:, span] = logits[:, span]
                rows.append(row)
                right.append(span.start + targets[:, number])
        return torch.cat(rows), torch.cat(right)


def spans(sizes: Mapping[str, int]) -> dict[str, slice]:
    """Head -> its slice of the list of all classes, by how many classes each has."""
    ends = list(accumulate(sizes.values()))
    return {name: slice(end - n, end) for (name, n), end in zip(sizes.items(), ends, strict=True)}


def _of_column(head: str, classes: Sequence[str], what: str) -> dict[str, list[int | str]]:
    """The task of a column of labels, by what classes of combinations are called."""
    found: dict[str, list[int | str]] = {}
    for place, name in enumerate(classes):
        parts = dict(part.partition("=")[::2] for part in name.split(", "))
        if head not in parts:
            raise ValueError(
                f"{what}: class {name!r} of the data set says nothing of a column {head!r}; read "
                "it from an npz file with columns, or write classes, or a list of them"
            )
        found.setdefault(parts[head], []).append(place)
    return found


def _column(task: Mapping[str, Sequence[int | str]], classes: Sequence[str], what: str) -> Tensor:
    """Which of a task's classes each class of the data set is. Raises `ValueError`."""
    if len(task) < 2:
        raise ValueError(f"{what}: a head tells at least two classes apart, got {len(task)}")
    column = torch.full((len(classes),), -1)
    for number, (name, members) in enumerate(task.items()):
        for each in members:
            if isinstance(each, str) and each not in classes:
                near = nearest(each, list(classes))
                raise ValueError(f"{what}.{name}: the data set has no class {each!r}{near}")
            place = classes.index(each) if isinstance(each, str) else each
            if not 0 <= place < len(classes):
                raise ValueError(f"{what}.{name}: classes are 0 to {len(classes) - 1}, got {place}")
            if column[place] >= 0:
                raise ValueError(
                    f"{what}.{name}: class {classes[place]!r} is one of "
                    f"{list(task)[int(column[place])]!r} already; list it once"
                )
            column[place] = number
        if not (column == number).any():
            raise ValueError(f"{what}.{name}: expected some classes of the data set, got none")
    if missing := [name for name, place in zip(classes, column.tolist()) if place < 0]:
        raise ValueError(f"{what}: is silent about {listed(missing)}; every class needs a place")
    return column
