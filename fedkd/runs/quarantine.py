"""Clients that misbehave again and again are left out for the rest of the run, until lifted.

A *strike* is a payload that had to be refused, or a round in which the fusion rules gave a client
next to no weight. Strikes are events in the run's metrics.jsonl, so they survive a resume, and
`fedkd quarantine` shows and lifts them.
"""

from __future__ import annotations

from fedkd.config import Quarantine
from fedkd.knowledge.payload import Fused
from fedkd.runs.directory import RunDirectory
from fedkd.runs.events import Event, Strike, StrikesLifted


def strike(run: RunDirectory, round_number: int, client: int, reason: str) -> None:
    """Write down one strike."""
    run.record(Strike(round=round_number, client=client, reason=reason))


def strikes(run: RunDirectory) -> dict[int, list[str]]:
    """Client -> reasons of its strikes since it was last lifted, in order."""
    found: dict[int, list[str]] = {}
    for event in run.events(Event):
        if isinstance(event, Strike):
            found.setdefault(event.client, []).append(f"round {event.round}: {event.reason}")
        elif isinstance(event, StrikesLifted):
            found.pop(event.client, None)
    return found


def quarantined(run: RunDirectory, options: Quarantine) -> dict[int, str]:
    """Client -> why it is left out, of those with enough strikes."""
    if options.after is None:
        return {}
    return {
        client: f"in quarantine after {len(reasons)} strikes (last in {reasons[-1]}); to lift it: "
        f"fedkd quarantine {run.identity} --lift {client}"
        for client, reasons in sorted(strikes(run).items())
        if len(reasons) >= options.after
    }


def lift(run: RunDirectory, client: int) -> int:
    """Forget a client's strikes, from the next round on; returns how many there were."""
    count = len(strikes(run).get(client, []))
    run.record(StrikesLifted(client=client))
    return count


def distrusted(fused: Fused, trust: float) -> list[int]:
    """Clients whose mean weight is below `trust` times an equal one; none if rules merged all."""
    least = trust / max(len(fused.shares), 1)
    return [client for client, share in fused.shares.items() if share < least]
