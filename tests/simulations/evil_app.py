"""Apps and nodes of an attacker, for the tests on real processes.

`write_app` makes a Flower app that is not fedkd's. Run as a program in a node's folder, with that
node's settings in the environment, this file is a SuperNode that runs an app of its own whatever
the server sends: it holds a registered key and obeys nobody.
"""

import dataclasses
import hashlib
import os
import sys
from pathlib import Path
from typing import Any

PROJECT = """\
[project]
name = "fedkd"
version = "0.1.0"
description = "evil"
license = "Apache-2.0"
dependencies = []
[tool.flwr.app]
publisher = "fedkd"
fab-include = ["*.py"]
[tool.flwr.app.components]
serverapp = "evil:server"
clientapp = "evil:client"
[tool.flwr.app.config]
config = ""
overrides = ""
output = ""
resume = ""
keys = ""
"""

# Reads what it can get at, on the server and on every node.
THIEF = """\
import os
from pathlib import Path
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

server = ServerApp()
client = ClientApp()
LOOT = Path({loot!r})

@server.main()
def main(grid, context):
    (LOOT / "server").write_text(str(os.getuid()))
    content = RecordDict({{"job": ConfigRecord()}})
    nodes = list(grid.get_node_ids())
    sent = [Message(content, dst_node_id=n, message_type="train", ttl=90) for n in nodes]
    with (LOOT / "replies").open("w") as file:
        for reply in grid.send_and_receive(sent, timeout=90):
            print(reply.error if reply.has_error() else "ANSWERED", file=file)

@client.train()
def train(message, context):
    (LOOT / f"node-{{context.node_config['partition-id']}}").write_text(str(context.node_config))
    return Message(RecordDict(), reply_to=message)
"""

# An honest client's app, but for what it sends.
LIAR = """\
import os
from pathlib import Path
import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from fedkd.simulations.client_app import make_client_app
from fedkd.simulations.deploy.identity import proof
from flwr.serverapp import ServerApp

server = ServerApp()

def lie(message, context, call):
    kind, node = message.metadata.message_type, context.node_config
    if kind == "query.describe":
        reply = call(message, context)
        if (victim := os.environ.get("VICTIM")):
            facts = reply.content["describe"]
            facts["client"] = int(victim)
            facts["signature"] = proof(
                Path(node["key"]), message.content["challenge"]["challenge"],
                message.content["job"]["run"], context.node_id, int(victim),
            )
        return reply
    rng = np.random.default_rng()
    numbers = {"round": 1, "loss": float("nan"), "self": 3, "epsilon": -7.0, "holdout_total": 5}
    junk = {f"x{n}": Array(rng.random(rng.integers(1, 9, n + 1))) for n in range(3)}
    from flwr.app import Message
    header = ConfigRecord({"run": "x" * 10_000, "round": -1, "client": 0, "junk": rng.bytes(5000)})
    content = RecordDict(
        {"metrics": MetricRecord(numbers), "transfer.arrays": ArrayRecord(junk),
         "transfer.header": header}
    )
    if kind == "train" and os.environ.get("TRAINS"):
        return call(message, context)
    return Message(content, reply_to=message)

client = make_client_app(mods=[lie])
"""


# An honest client's app, but that it gives its key for a secure sum and goes away before it votes.
DROPPER = """\
from fedkd.simulations.client_app import make_client_app
from flwr.serverapp import ServerApp

server = ServerApp()

def drop(message, context, call):
    if message.metadata.message_type == "query.masked":
        raise OSError("gone")
    return call(message, context)

client = make_client_app(mods=[drop])
"""


def write_app(folder: Path, source: str) -> Path:
    """A Flower app with this source, called like fedkd."""
    folder.mkdir()
    (folder / "pyproject.toml").write_text(PROJECT)
    (folder / "evil.py").write_text(source)
    return folder


def main(app: Path) -> None:
    """A SuperNode that runs `app`, whatever comes."""
    from flwr.cli.build import build_fab_from_disk
    from flwr.supercore.fab import Fab
    from flwr.supernode import start_client_internal as flower
    from flwr.supernode.cli import flower_supernode

    from fedkd.simulations.deploy.supernode import arguments_of

    content = build_fab_from_disk(app)
    ours = hashlib.sha256(content).hexdigest()
    pull: Any = flower._pull_and_store_message

    def swapped(*, get_run: Any, get_fab: Any, **rest: Any) -> Any:
        return pull(
            get_run=lambda run_id: dataclasses.replace(get_run(run_id), fab_hash=ours),
            get_fab=lambda name, run_id: Fab(ours, content, {}),
            **rest,
        )

    setattr(flower, "_pull_and_store_message", swapped)  # noqa: B010
    sys.argv = ["flower-supernode", *arguments_of(os.environ, Path.cwd())]
    flower_supernode()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
