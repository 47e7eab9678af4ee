"""A client's budget on disk: reserved before private images are read, never given back.

One JSON object per line; each carries a hash of itself and of the line before. A damaged, edited
or shortened ledger is not used: without a ledger nothing more is spent.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedkd.knowledge.store import write_atomically
from fedkd.privacy.accounting import Accountant, Steps, epsilon


class BudgetSpent(RuntimeError):
    """The next release would cost more than is left."""


class LedgerBroken(RuntimeError):
    """The ledger is not what was written, or belongs to other data or another promise."""


@dataclass(frozen=True)
class Account:
    """Whose budget it is; written first and never changed.

    Attributes:
        client: The client's number.
        data: Fingerprint of its private images.
        epsilon: Promise for the whole run.
        delta: Likewise.
        accountant: Which counts.
    """

    client: int
    data: str
    epsilon: float
    delta: float
    accountant: Accountant = "rdp"


class Ledger:
    """Budget of one client, kept in one file; processes take turns.

    Args:
        path: Created with mode 0600 if it does not exist.
        account: Whose it is.
        of_run: A run's own promise, which is never changed. Otherwise it is what a node's owner
            allows over all runs on the same images: the owner may change it, the data not.

    Raises:
        LedgerBroken: the file is damaged, or was opened for other data or another promise.
    """

    def __init__(self, path: Path, account: Account, *, of_run: bool = True) -> None:
        self.path = path
        self.account = account
        self._of_run = of_run
        self._head = path.with_suffix(".head")
        self._lines: list[Mapping[str, Any]] = []
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with self._alone():
            if not self._lines:
                self._append({"account": asdict(account)})

    @property
    def releases(self) -> list[Steps]:
        """All that was reserved, finished or not: what was begun may have been seen."""
        return [Steps(**line["reserve"]) for line in self._lines if "reserve" in line]

    @property
    def labels(self) -> float:
        """Epsilon of all randomised labels; with delta 0, so it is added to the rest."""
        return float(sum(line.get("labels", 0.0) for line in self._lines))

    @property
    def spent(self) -> float:
        """Epsilon so far."""
        return self.labels + epsilon(self.releases, self.account.delta, self.account.accountant)

    @property
    def seal(self) -> str:
        """Hash of all lines: whoever keeps it can tell later whether lines are missing."""
        return self._seals()[-1]

    def holds(self, seal: str) -> bool:
        """Whether the ledger once stood at this seal."""
        return seal in self._seals()

    def paid(self, round_number: int) -> bool:
        """Whether something was reserved for that round."""
        return any(line.get("round") == round_number and "reserve" in line for line in self._lines)

    def affords(self, steps: Steps) -> bool:
        """Whether `reserve` would take these steps as things stand."""
        return self._after(steps) <= self.account.epsilon * (1 + 1e-9)

    def reserve(self, round_number: int, steps: Steps, name: str | None = None) -> None:
        """Take budget for a round's training or sum; on disk when this returns.

        A round that is trained again after a crash draws new noise and is paid for again.

        Args:
            round_number: From 1.
            steps: What it costs.
            name: Of what is let out, where that may happen once only.

        Raises:
            BudgetSpent: nothing was reserved and no private image may be read; or something was
                reserved under this name already.
        """
        with self._alone():
            if name is not None and any(line.get("name") == name for line in self._lines):
                raise BudgetSpent(
                    f"round {round_number}: was answered already, under this very key"
                )
            self._afford(self._after(steps), f"round {round_number}")
            named = {} if name is None else {"name": name}
            self._append({"round": round_number, "reserve": asdict(steps), **named})

    def reserve_labels(self, cost: float) -> None:
        """Take budget for randomised labels of all images; as `reserve`."""
        with self._alone():
            self._afford(self.spent + cost, "randomised labels")
            self._append({"labels": cost})

    def settle(self, round_number: int) -> None:
        """Note that a round's training is done and its teacher kept."""
        with self._alone():
            self._append({"round": round_number, "settled": True})

    def _after(self, steps: Steps) -> float:
        releases = [*self.releases, steps]
        return self.labels + epsilon(releases, self.account.delta, self.account.accountant)

    def _afford(self, after: float, what: str) -> None:
        # Calibration stops within a thousandth; rounding must not cost the last round.
        if after > self.account.epsilon * (1 + 1e-9):
            raise BudgetSpent(
                f"{what} would bring client {self.account.client} to epsilon "
                f"{after:.4g}, its budget is {self.account.epsilon:g}"
            )

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Nobody else reads or writes meanwhile; begins with what the others have written."""
        descriptor = os.open(self.path.with_suffix(".lock"), os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            self._lines = []
            if self.path.exists():
                self._read()
            elif self._head.exists():
                raise LedgerBroken(
                    f"{self.path} is missing, but it was there: nothing more is spent"
                )
            yield
        finally:
            os.close(descriptor)

    def _read(self) -> None:
        before = ""
        whole, _, rest = self.path.read_text(encoding="utf-8").rpartition("\n")
        if rest:  # killed while writing: nothing had been read yet for what this line reserves
            with self.path.open("r+b") as file:
                file.truncate(len((whole + "\n").encode()) if whole else 0)
        for number, text in enumerate(whole.splitlines(), start=1):
            try:
                line = json.loads(text)
                seal = line.pop("hash")
            except (ValueError, KeyError, AttributeError):
                raise LedgerBroken(f"{self.path}, line {number}: cannot be read") from None
            if seal != _hash(before, line):
                raise LedgerBroken(f"{self.path}, line {number}: was changed")
            self._lines.append(line)
            before = seal
        recorded = self._head.read_text(encoding="utf-8") if self._head.exists() else ""
        if recorded != before and _hash(recorded, self._lines[-1] if self._lines else {}) != before:
            raise LedgerBroken(f"{self.path}: lines are missing at its end")
        if not self._lines or "account" not in self._lines[0]:
            raise LedgerBroken(f"{self.path}: names no account")
        for key, ours in asdict(self.account).items():
            theirs = self._lines[0]["account"].get(key)
            if theirs != ours and (self._of_run or key == "data"):
                raise LedgerBroken(
                    f"{self.path}: was opened for {key} {theirs!r}, this run has {ours!r}; "
                    "a promise once given cannot be changed: start a new run"
                )

    def _append(self, line: Mapping[str, object]) -> None:
        seal = _hash(self.seal, line)
        text = json.dumps({**line, "hash": seal}) + "\n"
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        self._lines.append(line)
        # One line behind at most, if killed right here.
        write_atomically(self._head, seal.encode())
        self._head.chmod(0o600)

    def _seals(self) -> list[str]:
        """After each line, from none."""
        seals = [""]
        for line in self._lines:
            seals.append(_hash(seals[-1], line))
        return seals


def _hash(before: str, line: Mapping[str, object]) -> str:
    text = before + json.dumps(line, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
