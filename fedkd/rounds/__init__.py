"""One round, from both ends: what a client does (`Client`) and what the server does (`Server`).

No transport and no config file in here: `strategies/` moves the bytes, `simulations/` decides
where the two ends live.
"""

from fedkd.rounds.client import Client, train_together
from fedkd.rounds.context import ExperimentContext, context_of_run, experiment_context
from fedkd.rounds.evidence import evidence_of
from fedkd.rounds.progress import Interrupted, Notify, Stopwatch, computing, silent
from fedkd.rounds.server import Server

__all__ = [
    "Client",
    "ExperimentContext",
    "Interrupted",
    "Notify",
    "Server",
    "Stopwatch",
    "computing",
    "context_of_run",
    "evidence_of",
    "experiment_context",
    "silent",
    "train_together",
]
