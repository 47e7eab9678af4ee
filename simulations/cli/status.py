"""`fedkd status`: how a run stands, read from its folder alone (live, finished or killed)."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from fedkd.simulations.cli.arguments import RunPath
from fedkd.simulations.cli.configs import open_run

if TYPE_CHECKING:
    from fedkd.runs.events import EpochFinished, MessageCounted


@dataclass
class Health:
    """One client, as far as the run's folder tells.

    Attributes:
        last_round: Latest round in which something of it was accepted or refused.
        seconds: Mean seconds per phase, for the phases that were timed.
        refusals: Phases that it lost.
        reason: Why it lost the latest one.
        up: Bytes it sent.
        seen: When it last answered (Unix time); None if it never did.
    """

    last_round: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    refusals: int = 0
    reason: str = ""
    up: int = 0
    seen: float | None = None


@dataclass
class Status:
    """How a run stands."""

    state: str
    round: int
    rounds: int
    phase: str
    accuracy: float | None
    changed: float
    clients: dict[int, Health]
    down: int
    up: int
    disk: dict[str, int]


def status_of(path: Path) -> Status:
    """Read a run's folder; nothing is written and no process is asked.

    Raises:
        ConfigError: `path` is no run directory.
    """
    from fedkd.runs.events import EpochFinished, ReplyRefused, RoundFinished
    from fedkd.runs.results import listed

    run = open_run(path)
    rounds, messages = run.events(RoundFinished), run.messages()
    finished = rounds[-1].round if rounds else 0
    asked = (message.client for message in messages)
    clients = {number: Health() for number in listed(run.experiment.clients, asked)}
    for message in messages:
        if message.client in clients:
            health = clients[message.client]
            health.up += message.up
            if message.up > 0:
                health.last_round = max(health.last_round, message.round)
                health.seen = message.time or health.seen
    for refusal in run.events(ReplyRefused):
        if refusal.client in clients:
            health = clients[refusal.client]
            health.refusals += 1
            health.reason = f"round {refusal.round}, {refusal.phase}: {refusal.reason}"
    _seconds(messages, clients)
    changed = max(
        (p.stat().st_mtime for p in run.path.iterdir() if p.is_file()),
        default=run.path.stat().st_mtime,
    )
    done = (run.path / "summary.json").is_file() and run.is_over
    current = finished if done else finished + 1
    return Status(
        state="finished" if done else "unfinished",
        round=current,
        rounds=run.experiment.rounds,
        phase="-" if done else _phase(run.events(EpochFinished), messages, current),
        accuracy=rounds[-1].student.accuracy if rounds else None,
        changed=changed,
        clients=clients,
        down=sum(message.down for message in messages),
        up=sum(message.up for message in messages),
        disk=_disk(run.path),
    )


def _seconds(messages: list[MessageCounted], clients: dict[int, Health]) -> None:
    spent: dict[tuple[int, str], list[float]] = {}
    for message in messages:
        if message.client in clients and message.seconds is not None and message.up > 0:
            spent.setdefault((message.client, message.phase), []).append(message.seconds)
    for (client, phase), values in spent.items():
        clients[client].seconds[phase] = sum(values) / len(values)


def _phase(epochs: list[EpochFinished], messages: list[MessageCounted], current: int) -> str:
    """The latest phase of which anything is recorded in the round under way."""
    from fedkd.runs.events import PhaseName

    seen = {message.phase for message in messages if message.round == current}
    seen |= {"distil" for epoch in epochs if epoch.round == current}
    return max(seen, key=get_args(PhaseName).index, default="waiting for clients")


def _disk(path: Path) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for file in path.rglob("*"):
        try:
            size = file.stat().st_size if file.is_file() else 0
        except OSError:  # a live run replaces files under us
            continue
        part = file.relative_to(path).parts
        name = part[0] if len(part) > 1 else "files"
        sizes[name] = sizes.get(name, 0) + size
    return sizes


def status(
    path: RunPath,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON, for scripts")] = False,
) -> None:
    """Show a run's round and phase, its clients' health, bytes and disk."""
    from dataclasses import asdict

    from rich.table import Table

    from fedkd.simulations.cli.screen import screen

    found = status_of(path)
    if as_json:
        print(json.dumps(asdict(found), indent=2))
        return
    now = time.time()
    console = screen(highlight=False, soft_wrap=True)
    score = "" if found.accuracy is None else f", student {100 * found.accuracy:.2f} %"
    phase = "" if found.state == "finished" else f" ({found.phase})"
    console.print(f"{found.state}: round {found.round} of {found.rounds}{phase}{score}")
    console.print(f"last written {_ago(now - found.changed)} ago")
    table = Table(box=None, padding=(0, 2))
    table.add_column("client")
    for name in ("round", "seen", "train", "answer", "judge", "sent", "lost"):
        table.add_column(name, justify="right")
    for number, health in found.clients.items():
        seen = "never" if not health.last_round else "-"
        if health.seen is not None:
            seen = f"{_ago(now - health.seen)} ago"
        times = [
            f"{health.seconds[phase]:.1f} s" if phase in health.seconds else "-"
            for phase in ("train", "knowledge", "evaluate")
        ]
        row = [str(health.last_round or "-"), seen, *times, _size(health.up), str(health.refusals)]
        table.add_row(str(number), *row)
    console.print(table)
    for number, health in found.clients.items():
        if health.reason:
            console.print(f"client {number}, {health.reason}", markup=False)
    console.print(f"messages: {_size(found.down)} down, {_size(found.up)} up")
    parts = ", ".join(f"{name} {_size(size)}" for name, size in sorted(found.disk.items()))
    console.print(f"disk: {_size(sum(found.disk.values()))} ({parts})", markup=False)


def _ago(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.0f} h" if seconds < 172800 else f"{seconds / 86400:.0f} days"


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError
