"""Tables for whoever wants all numbers."""

from __future__ import annotations

from fedkd.reporting.run_record import Found, Record
from fedkd.runs.privacy_statement import statement


def privacy(found: Found) -> Record | None:
    """The statement, with clients of the same fate in one row."""
    facts = statement(found.run)
    if facts is None:
        return None
    fates: dict[tuple[float, tuple[int, ...]], list[str]] = {}
    for client, mine in facts["clients"].items():
        fates.setdefault((mine["epsilon"], tuple(mine["frozen_in"])), []).append(client)
    rows = [
        {
            "clients": ", ".join(who) if len(who) < len(facts["clients"]) else f"all {len(who)}",
            "epsilon": f"{epsilon:.4g}",
            "share": epsilon / facts["budget"],
            "frozen": ", ".join(map(str, frozen)),
        }
        for (epsilon, frozen), who in fates.items()
    ]
    return {**facts, "rows": rows}


def traffic_tables(found: Found) -> Record:
    """Totals per phase and per client, and for scale what other ways would cost."""
    phases: dict[str, dict[str, int]] = {}
    clients: dict[int, dict[str, int]] = {}
    for message in found.messages:
        total = phases.setdefault(message.phase, {"down": 0, "up": 0})
        for way, size in (("down", message.down), ("up", message.up)):
            total[way] += size
            # When nodes describe themselves it is not known which clients they are.
            if message.client is not None and message.phase != "describe":
                row = clients.setdefault(message.client, {})
                for key in (f"{message.phase} {way}", way):
                    row[key] = row.get(key, 0) + size
    parameters = found.summary.get("student", {}).get("parameters")
    return {
        "phases": phases,
        "total": {way: sum(p[way] for p in phases.values()) for way in ("down", "up")},
        "columns": [p for p in ("train", "knowledge", "evaluate") if p in phases],
        "clients": dict(sorted(clients.items())),
        "transfer": found.transfer["bytes"],
        "images": found.transfer["size"],
        "weights": None if parameters is None else 4 * parameters,
    }
