"""A client's budget on disk: reserved before private images are read, never given back.

One JSON object per line; each carries a hash of itself and of the line before. A damaged, edited
or shortened ledger is not used: without a ledger nothing more is spent.
"""

from __future__ import annotations

import hashlib
import json
import os
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
    """Budget of one client, kept in one file.

    Args:
        path: Created with mode 0600 if it does not exist.
        account: Whose it is.

    Raises:
        LedgerBroken: the file is damaged, or was opened for other data or another promise.
    """

    def __init__(self, path: Path, account: Account) -> None:
        self.path = path
        self.account = account
        self._head = path.with_suffix(".head")
        self._lines: list[dict[str, Any]] = []
        if path.exists():
            self._read()
        else:
            if self._head.exists():
                raise LedgerBroken(f"{path} is missing, but it was there: nothing more is spent")
            path.parent.mkdir(parents=True, exist_ok=True)
            self._append({"account": asdict(account)})

    @property
    def releases(self) -> list[Steps]:
        """All that was reserved, finished or not: what was begun may have been seen."""
        return [Steps(**line["reserve"]) for line in self._lines if "reserve" in line]

    @property
    def spent(self) -> float:
        """Epsilon so far."""
        return epsilon(self.releases, self.account.delta, self.account.accountant)

    def paid(self, round_number: int) -> bool:
        """Whether something was reserved for that round."""
        return any(line.get("round") == round_number and "reserve" in line for line in self._lines)

    def reserve(self, round_number: int, steps: Steps) -> None:
        """Take budget for a round's training; on disk when this returns.

        A round that is trained again after a crash draws new noise and is paid for again.

        Raises:
            BudgetSpent: nothing was reserved and no private image may be read.
        """
        after = epsilon([*self.releases, steps], self.account.delta, self.account.accountant)
        # Calibration stops within a thousandth; rounding must not cost the last round.
        if after > self.account.epsilon * (1 + 1e-9):
            raise BudgetSpent(
                f"round {round_number} would bring client {self.account.client} to epsilon "
                f"{after:.4g}, its budget is {self.account.epsilon:g}"
            )
        self._append({"round": round_number, "reserve": asdict(steps)})

    def settle(self, round_number: int) -> None:
        """Note that a round's training is done and its teacher kept."""
        self._append({"round": round_number, "settled": True})

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
        told = self._head.read_text(encoding="utf-8") if self._head.exists() else ""
        if told != before and _hash(told, self._lines[-1] if self._lines else {}) != before:
            raise LedgerBroken(f"{self.path}: lines are missing at its end")
        if not self._lines or "account" not in self._lines[0]:
            raise LedgerBroken(f"{self.path}: names no account")
        for key, ours in asdict(self.account).items():
            theirs = self._lines[0]["account"].get(key)
            if theirs != ours:
                raise LedgerBroken(
                    f"{self.path}: was opened for {key} {theirs!r}, this run has {ours!r}; "
                    "a promise once given cannot be changed: start a new run"
                )

    def _append(self, line: dict[str, Any]) -> None:
        before = self._seal()
        seal = _hash(before, line)
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

    def _seal(self) -> str:
        seal = ""
        for line in self._lines:
            seal = _hash(seal, line)
        return seal


def _hash(before: str, line: dict[str, Any]) -> str:
    text = before + json.dumps(line, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
