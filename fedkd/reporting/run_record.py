"""What the page and the tables of a run are made of, read once."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from fedkd.data.splits import FederatedData
from fedkd.io.records import read_json
from fedkd.runs.choice import kept_round, validated
from fedkd.runs.directory import RunDirectory
from fedkd.runs.events import (
    ClientEvaluated,
    ClientsAsked,
    EpochFinished,
    MessageCounted,
    OldAnswersCounted,
    ReplyRefused,
    RoundFinished,
    holdout_accuracies,
    seconds_by_phase,
)
from fedkd.runs.images import run_data
from fedkd.runs.results import CURVES, listed
from fedkd.runs.signature import read_signature
from fedkd.training.evaluation import Scores

logger = logging.getLogger(__name__)

Record = dict[str, Any]
# What can go wrong while reading data or knowledge again; the page then says what is missing.
TROUBLE = (OSError, ValueError, RuntimeError, ImportError)


@dataclass(frozen=True)
class Found:
    """A run that is finished, under way or failed.

    Attributes:
        run: Its folder.
        given: Its images, where they are at hand.
    """

    run: RunDirectory
    given: FederatedData | None = None

    @cached_property
    def rounds(self) -> list[RoundFinished]:
        """The finished rounds."""
        return self.run.events(RoundFinished)

    @cached_property
    def asked(self) -> list[ClientsAsked]:
        """The cohorts of the finished rounds; none where every round asks all clients."""
        done = {event.round for event in self.rounds}
        return [event for event in self.run.events(ClientsAsked) if event.round in done]

    @cached_property
    def old(self) -> dict[int, dict[int, int]]:
        """Round -> client -> the earlier round whose answers counted for it."""
        return {event.round: event.clients for event in self.run.events(OldAnswersCounted)}

    @cached_property
    def clients(self) -> list[int]:
        """Those that were asked in some round."""
        if not self.asked:
            return list(range(self.run.experiment.clients))
        return sorted({client for event in self.asked for client in event.asked})

    @cached_property
    def teachers(self) -> dict[int, float | None]:
        """Client -> its teacher's test accuracy in the last round that asked it."""
        rounds = self.rounds if self.asked else self.rounds[-1:]
        return {client: share for event in rounds for client, share in event.teachers.items()}

    @cached_property
    def noisy(self) -> dict[str, list[Record]]:
        """Client -> what it measured of each epoch on noisy labels, as far as that lies here."""
        if self.run.experiment.promises:
            return {}
        found = {}
        for client in self.listed:
            place = self.run.client(client) / CURVES
            records = read_json(place, list[Record]) if place.is_file() else None
            if records:
                found[f"client {client}"] = records
        return found

    @cached_property
    def epochs(self) -> list[EpochFinished]:
        """The student's epochs."""
        return self.run.events(EpochFinished)

    @cached_property
    def refused(self) -> list[ReplyRefused]:
        """Replies that were not used."""
        return self.run.events(ReplyRefused)

    @cached_property
    def holdouts(self) -> dict[int, float]:
        """Client -> the student's accuracy on its held-out images."""
        return holdout_accuracies(self.run.events(ClientEvaluated))

    @cached_property
    def tested(self) -> int | None:
        """How many test images accuracies are counted on, as far as known."""
        if self.given is not None:
            return len(self.given.test)
        size: int | None = self.summary.get("test", {}).get("size")
        return size

    @cached_property
    def held_out(self) -> dict[int, float]:
        """Client -> its held-out images."""
        return {e.client: e.holdout_total for e in self.run.events(ClientEvaluated)}

    @cached_property
    def messages(self) -> list[MessageCounted]:
        """All messages."""
        return self.run.messages()

    @cached_property
    def listed(self) -> list[int]:
        """The clients that are shown one by one."""
        asked = (message.client for message in self.messages)
        return listed(self.run.experiment.clients, asked)

    @cached_property
    def summary(self) -> Record:
        """What the run came to; empty while it is under way."""
        return self.run.read_json("summary.json") or {}

    @property
    def data(self) -> FederatedData | None:
        """The images; None where they cannot be loaded, and `data_problem` has the reason."""
        return self._loaded[0]

    @property
    def data_problem(self) -> str | None:
        """Why the images could not be loaded."""
        return self._loaded[1]

    @cached_property
    def _loaded(self) -> tuple[FederatedData | None, str | None]:
        if self.given is not None:
            return self.given, None
        try:
            return run_data(self.run), None
        except TROUBLE as error:
            name = self.run.identity
            logger.warning("report of %s without figures of the data: %s", name, error)
            return None, str(error)

    @property
    def last(self) -> RoundFinished | None:
        """The last finished round, if any."""
        return self.rounds[-1] if self.rounds else None

    @property
    def kept(self) -> RoundFinished | None:
        """The round whose student leaves the run, as far as known; mostly the last."""
        number = kept_round(self.run.experiment, validated(self.rounds))
        return next((event for event in self.rounds if event.round == number), None)

    @property
    def scores(self) -> dict[str, Scores]:
        """`student`, `ensemble` -> their scores in the last evaluation, as far as known."""
        if self.last is None or self.kept is None:
            return {}
        found = {"student": self.kept.student, "ensemble": self.last.ensemble}
        return {who: scores for who, scores in found.items() if scores is not None}

    def accuracy(self, who: str) -> float | None:
        """Accuracy of `student` or `ensemble` in the last evaluation."""
        return self.scores[who].accuracy if who in self.scores else None

    @cached_property
    def classes(self) -> list[str]:
        """Class names as the run has them; numbers where only their count is known."""
        signature = read_signature(self.run)
        if signature is not None:
            return list(signature.classes)
        if "classes" in self.summary:
            return list(self.summary["classes"])
        if self.data is not None:
            return list(self.data.classes)
        return [str(c) for c in range(len(self.last.student.per_class if self.last else ()))]

    @cached_property
    def class_counts(self) -> np.ndarray | None:
        """Private images per client and class; None where they are unknown, or protected."""
        if self.run.experiment.promises:
            return None
        if "class_counts" in self.summary:
            return np.asarray(self.summary["class_counts"])
        return None if self.data is None else self.data.class_counts().numpy()

    @cached_property
    def wrong_labels(self) -> list[float | None] | None:
        """Share of wrong labels in each client's training; None without noise, or protected."""
        experiment = self.run.experiment
        if experiment.promises or experiment.data.label_noise is None:
            return None
        if "wrong_labels" in self.summary:
            return list(self.summary["wrong_labels"])
        return None if self.data is None else self.data.wrong_labels()

    @cached_property
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

    @cached_property
    def seconds(self) -> dict[str, float]:
        """Phase -> seconds of all rounds; `start-up` of whatever else there was."""
        sums = seconds_by_phase(self.rounds)
        rest = self.summary.get("seconds", {}).get("total", 0.0) - sum(sums.values())
        return {**sums, "start-up": rest} if rest > 0.05 else sums
