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
    for entry in found.ledger:
        total = phases.setdefault(entry["phase"], {"down": 0, "up": 0})
        for way in ("down", "up"):
            total[way] += entry[way]
        # When nodes describe themselves the ledger holds node ids: their clients are not known.
        if entry["phase"] != "describe":
            row = clients.setdefault(entry["client"], {})
            for way in ("down", "up"):
                key = f"{entry['phase']} {way}"
                row[key] = row.get(key, 0) + entry[way]
                row[way] = row.get(way, 0) + entry[way]
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
