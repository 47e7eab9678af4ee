"""What a page about a run is made of, read once."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure

from fedkd.data.splits import FederatedData
from fedkd.reporting import figures
from fedkd.runs.directory import RunDirectory
from fedkd.runs.events import (
    ClientEvaluated,
    EpochFinished,
    MessageCounted,
    ReplyRefused,
    RoundFinished,
    holdout_accuracies,
)
from fedkd.runs.images import run_data
from fedkd.runs.signature import Signature, read_signature
from fedkd.training.evaluation import Scores

logger = logging.getLogger(__name__)

Record = dict[str, Any]
# What can go wrong while reading data or knowledge again; the page then says what is missing.
TROUBLE = (OSError, ValueError, RuntimeError, ImportError)


@dataclass
class Found:
    """Everything the page is made of, read once."""

    run: RunDirectory
    rounds: list[RoundFinished]
    epochs: list[EpochFinished]
    refused: list[ReplyRefused]
    verdicts: dict[int, float]
    messages: list[MessageCounted]
    summary: Record
    data: FederatedData | None = None
    data_problem: str | None = None
    signature: Signature | None = None
    pictures: int = field(default=0)

    @classmethod
    def read(cls, run: RunDirectory) -> Found:
        """Everything that is there; what cannot be loaded is said in `data_problem`."""
        data, problem, signature = None, None, read_signature(run)
        try:
            data = run_data(run)
        except TROUBLE as error:
            problem = str(error)
            logger.warning("report of %s without pictures of the data: %s", run.identity, problem)
        return cls(
            run,
            run.events(RoundFinished),
            run.events(EpochFinished),
            run.events(ReplyRefused),
            holdout_accuracies(run.events(ClientEvaluated)),
            run.messages(),
            run.read_json("summary.json") or {},
            data,
            problem,
            signature,
        )

    @property
    def last(self) -> RoundFinished | None:
        """The last finished round, if any."""
        return self.rounds[-1] if self.rounds else None

    @property
    def scores(self) -> dict[str, Scores]:
        """`student`, `ensemble` -> their scores in the last evaluation, as far as known."""
        if self.last is None:
            return {}
        found = {"student": self.last.student, "ensemble": self.last.ensemble}
        return {who: scores for who, scores in found.items() if scores is not None}

    def accuracy(self, who: str) -> float | None:
        """Accuracy of `student` or `ensemble` in the last evaluation."""
        return self.scores[who].accuracy if who in self.scores else None

    @property
    def classes(self) -> list[str]:
        """Class names as the run has them; numbers where only their count is known."""
        if self.signature is not None:
            return list(self.signature.classes)
        if "classes" in self.summary:
            return list(self.summary["classes"])
        if self.data is not None:
            return list(self.data.classes)
        return [str(c) for c in range(len(self.last.student.per_class if self.last else ()))]

    @property
    def class_counts(self) -> np.ndarray | None:
        """Private images per client and class; None where they are unknown, or protected."""
        if self.run.experiment.promises:
            return None
        if self.data is not None:
            return self.data.class_counts().numpy()
        counts = self.summary.get("class_counts")
        return None if counts is None else np.asarray(counts)

    @property
    def transfer(self) -> Record:
        """Size and bytes of the transfer set, as far as known."""
        if "transfer" in self.summary:
            return dict(self.summary["transfer"])
        if self.data is None:
            options = self.run.experiment.data.transfer
            return {"size": options.size, "labelled": options.labelled, "bytes": None}
        images = self.data.transfer.images.images
        labelled = self.data.transfer.labelled
        return {"size": len(images), "labelled": labelled, "bytes": images.numel()}

    def draw(self, make: Callable[..., Figure], *args: Any, **options: Any) -> Markup:
        """A picture, ready for the page."""
        self.pictures += 1
        return Markup(figures.svg(make(*args, **options), f"picture{self.pictures}"))
