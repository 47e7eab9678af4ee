"""The same rounds in one process, without Ray: for tests, notebooks and debugging.

`LocalGrid` is a Flower grid whose nodes are function calls. It runs the very ServerApp job and
ClientApp of the other runners, and a parity test keeps the student bit-identical.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterable
from typing import Any
from uuid import uuid4

from fedkd.io.extras import extra

with extra("simulation", "fedkd.simulations.local"):
    from flwr.app import Context, Error, Message, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid
    from flwr.supercore.task_identity import TaskIdentity

from fedkd.config import Experiment
from fedkd.rounds import Notify, silent
from fedkd.runs.directory import RunDirectory
from fedkd.simulations.client_app import make_client_app
from fedkd.simulations.job import begun, players_of, run_job
from fedkd.strategies.workers import CLIENT_APP_RAISED

RUN_ID, SERVER_NODE = 1, 1


class LocalGrid(Grid):
    """A grid of `nodes` nodes that answer at once, in this process."""

    def __init__(
        self, client_app: ClientApp, nodes: int, node_config: dict[str, Any] | None = None
    ) -> None:
        self._app = client_app
        # Flower stamps messages with the process's task; here nobody else has set it.
        TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = RUN_ID, 1, SERVER_NODE
        self._contexts = {
            # Ids in another order than the partitions, as on a real federation.
            1000 - number: Context(
                run_id=RUN_ID,
                node_id=1000 - number,
                node_config={
                    "partition-id": number,
                    "num-partitions": nodes,
                    **(node_config or {}),
                },
                state=RecordDict(),
                run_config={},
            )
            for number in range(nodes)
        }
        self._replies: dict[str, Message] = {}

    def set_run(self, run: Any) -> None:
        """Unused: there is one run."""

    @property
    def run(self) -> Any:
        """Unused: there is one run."""
        return None

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        """Flower's deprecated constructor."""
        raise NotImplementedError("use flwr.app.Message")

    def get_node_ids(self) -> Iterable[int]:
        """All nodes, in no useful order."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Deliver messages; each node answers before the next one is asked."""
        identities = []
        for message in messages:
            identity = str(uuid4())
            message.metadata.__dict__["_message_id"] = identity
            self._replies[identity] = self._answer(message)
            identities.append(identity)
        return identities

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Replies not yet pulled."""
        return [self._replies.pop(i) for i in message_ids if i in self._replies]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Push and pull."""
        return self.pull_messages(self.push_messages(messages))

    def _answer(self, message: Message) -> Message:
        try:
            return self._app(message, self._contexts[message.metadata.dst_node_id])
        except Exception:  # Flower turns whatever a ClientApp raises into an error reply
            error = Error(CLIENT_APP_RAISED, traceback.format_exc())
            return Message(error, reply_to=message)


def run_local(
    experiment: Experiment,
    *,
    run: RunDirectory | None = None,
    notify: Notify = silent,
    client_app: ClientApp | None = None,
    nodes: int | None = None,
) -> RunDirectory:
    """Run an experiment in this process and return its run directory; arguments as `run_ray`."""
    run, context = begun(experiment, run, workers=False)
    players = None if nodes else players_of(experiment)
    grid = LocalGrid(client_app or make_client_app(), nodes or players or experiment.clients)
    run_job(grid, run, context, notify=notify, players=players)
    return run
