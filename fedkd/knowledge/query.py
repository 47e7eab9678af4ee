"""What is asked of a client about a set of images, and what it answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np

from fedkd.knowledge.codecs.base import Codec
from fedkd.knowledge.codecs.float16 import Float16
from fedkd.knowledge.kinds import Kind

HeaderValue = int | str | list[int]
Header = Mapping[str, HeaderValue]
Answers = Mapping[Kind, np.ndarray]
"""A client's answers by kind, as the server decoded them."""


class Images(StrEnum):
    """Which images a query is about; the value names its folder and its records in a message."""

    #: The student learns from them.
    TRANSFER = "transfer"
    #: Labelled images of the server, on which fusion rules measure the teachers.
    VALIDATION = "validation"
    #: Teachers and their ensemble are measured on them.
    TEST = "test"
    #: The test images in each of the clients' domains, one set after the other.
    SOURCES = "sources"


@dataclass(frozen=True)
class Query:
    """What one client is asked in one round about one set of images.

    Both ends derive it from the config, so it never travels.

    Attributes:
        images: Which images.
        run: Identity of the run (not Flower's: it survives a resume).
        round: Round number, from 1.
        fingerprint: Hash of the images.
        class_map: Hash of the names, in order, of the classes that this client knows.
        num_samples: N, how many images there are.
        num_classes: C.
        shapes: Kinds that are asked for, each with the shape of a sample's entry (of a teacher's
            statistic: of the whole) from this client's network.
        codec: How numbers are written.
        max_abs: Largest magnitude believed.
        disclose: Metadata that is asked for: `num_examples`, `class_counts`.
        parameters: Size of this client's network.
        base: The last round before this one whose answers the server holds from this client (0 if
            there is none): a codec that sends changes sends those since then.
        knows: Which of the C classes this client knows; None: all.
        index: Samples that are asked about, sorted; None for all. Of the others the server keeps
            what it holds of round `base`.
    """

    images: Images
    run: str
    round: int
    fingerprint: str
    class_map: str
    num_samples: int
    num_classes: int
    shapes: Mapping[Kind, tuple[int, ...]]
    codec: Codec = field(default_factory=Float16)
    max_abs: float = 1e4
    disclose: tuple[str, ...] = ()
    parameters: int | None = None
    base: int = 0
    knows: tuple[bool, ...] | None = None
    index: np.ndarray | None = field(default=None, compare=False)

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """Kinds that are asked for."""
        return tuple(self.shapes)

    def part(self, kind: Kind, values: np.ndarray) -> np.ndarray:
        """The part of a kind's answers that travels."""
        return values if self.index is None or not kind.per_sample else values[self.index]


@dataclass(frozen=True)
class Reply:
    """A client's answers to one query, as they travel.

    Attributes:
        arrays: By the kind's name, written by the codec.
        header: Which query is answered, and what the client discloses of itself.
    """

    arrays: Mapping[str, np.ndarray]
    header: Header


class Refused(ValueError):
    """A reply that must not be used; the message is the reason shown in the report."""
