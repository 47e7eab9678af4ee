"""One round, from both ends: what a client does (`Client`) and what the server does (`Server`).

No transport and no config file in here: `strategies/` moves the bytes, `simulations/` decides
where the two ends live.
"""

from fedkd.rounds.client import Client
from fedkd.rounds.context import ExperimentContext, workspace, workspace_of
from fedkd.rounds.progress import Notify, Stopwatch, silent, threads
from fedkd.rounds.server import Server

__all__ = [
    "Client",
    "ExperimentContext",
    "Notify",
    "Server",
    "Stopwatch",
    "silent",
    "threads",
    "workspace",
    "workspace_of",
]
