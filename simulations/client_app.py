"""The Flower ClientApp: messages in, `fedkd.rounds.Client` does the work, messages out."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedkd import __version__
from fedkd.config import read_experiment
from fedkd.data.own import Own, write_private, write_public
from fedkd.rounds import Client, Workspace, threads, workspace
from strategies.records import JOB, METRICS, STUDENT, knowledge_records

# `query.describe`, `train`, `query.knowledge`, `evaluate`: the four things a client is asked.


def make_client_app(mods: Sequence[Any] = ()) -> ClientApp:
    """The app; `mods` wrap every message (fault injection, extra privacy)."""
    app = ClientApp(mods=list(mods))

    @app.query("describe")
    def describe(message: Message, context: Context) -> Message:
        client, _ = _client(message, context)
        facts = ConfigRecord(
            {
                "client": client.number,
                "partitions": int(context.node_config.get("num-partitions", 0)),
                "fingerprint": client.workspace.data.transfer.fingerprint,
                "class_map": client.workspace.class_map,
                "fedkd": __version__,
            }
        )
        return Message(RecordDict({"describe": facts}), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        client, round_number = _client(message, context)
        with threads(client.experiment.resources.client_cpus):
            fit = client.train(round_number, _student(message))
        # Measured on private images, and disclosed to the server like everything in a reply: so
        # only where nothing is promised about them.
        known = {"loss": fit.loss, "accuracy": fit.accuracy}  # unknown for an empty shard
        metrics = MetricRecord({k: value for k, value in known.items() if math.isfinite(value)})
        if client.spent is not None:
            trained = float(client.paid(round_number))
            metrics = MetricRecord({"epsilon": client.spent, "trained": trained})
        elif client.experiment.release is not None:
            metrics = MetricRecord({})
        return Message(RecordDict({METRICS: metrics}), reply_to=message)

    @app.query("knowledge")
    def knowledge(message: Message, context: Context) -> Message:
        client, round_number = _client(message, context)
        with threads(client.experiment.resources.client_cpus):
            base = int(message.content.config_records[JOB].get("held", 0))  # type: ignore[arg-type]
            arrays, header = client.answer(round_number, base=base)
        return Message(knowledge_records(arrays, header), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        client, round_number = _client(message, context)
        content = RecordDict()
        with threads(client.experiment.resources.client_cpus):
            if client.experiment.evaluation.teachers:
                content.update(knowledge_records(*client.answer(round_number, test=True)))
            student = _student(message)
            if student is not None:
                right, total = client.judge(student)
                content[METRICS] = MetricRecord({"holdout_right": right, "holdout_total": total})
        return Message(content, reply_to=message)

    return app


def _client(message: Message, context: Context) -> tuple[Client, int]:
    """The client this node plays, and the round it is asked about."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    job = message.content.config_records[JOB]
    node = context.node_config
    if "partition-id" not in node:
        raise RuntimeError(
            "this node does not know which client it is: start it with "
            "--node-config 'partition-id=0 num-partitions=8'"
        )
    number, run = int(node["partition-id"]), str(job["run"])
    root = node.get("data-root") or _given_root(node, job) or os.environ.get("FEDKD_DATA") or None
    folder = _state_dir(node, job) / f"client-{number:04d}"
    space = _space(job, str(root) if root else None, number, node, folder)
    ours, theirs = space.data.transfer.fingerprint, job["fingerprint"]
    # Asked who it is, a node answers all the same: the server then names it and its reason.
    if ours != theirs and message.metadata.message_type != "query.describe":
        raise RuntimeError(f"client {number} has transfer set {ours!r}, the server {theirs!r}")
    return Client(space, number, run, folder), int(job["round"])  # type: ignore[arg-type]


def _space(job: ConfigRecord, root: str | None, number: int, node: Any, folder: Path) -> Workspace:
    """What the config means on this node.

    A real node starts a process for every message. It keeps its part of the split beside its
    teachers, so that only the first message of a run reads and deals the data set.
    """
    sent = job["config"]
    if not isinstance(sent, bytes):
        raise RuntimeError("the server speaks an older protocol: install its version of fedkd here")
    config = read_experiment(sent).to_json()
    kept = Own(number, folder / "private.npz", folder / "public.npz")
    if kept.public is not None and kept.public.is_file():
        return workspace(config, root, kept)
    data = node.get("data")
    own = Own(number, Path(str(data)).expanduser()) if data else None
    space = workspace(config, root, own)
    if space.experiment.data.public is not None and own is None:
        raise RuntimeError(
            f"client {number} has no images of its own, and the experiment deals none: start the "
            "node with --node-config 'data=\"/path/of/its/images\"'"
        )
    fits = space.data.transfer.fingerprint == job["fingerprint"] and number in range(
        space.experiment.clients
    )
    if kept.public is not None and _own_state(node) and fits:
        write_private(space.data, number, kept.private)
        write_public(space.data, kept.public, answers=False)
    return space


def _given_root(node: Any, job: ConfigRecord) -> str | None:
    """Where a simulation's images are, if the server found them elsewhere than a client would.

    A real node has a state folder of its own; no path of the server is meant for it.
    """
    given = str(job.get("data-root") or "")
    return given if given and not _own_state(node) and Path(given).is_dir() else None


def _own_state(node: Any) -> str | None:
    return node.get("state-dir") or os.environ.get("FEDKD_STATE") or None


def _state_dir(node: Any, job: ConfigRecord) -> Path:
    """Where this node keeps its teachers: its own choice, else the simulation's run directory.

    The server chooses neither.
    """
    own, run = _own_state(node), str(job["run"])
    if Path(run).name != run:
        raise RuntimeError(f"the server's run has the name {run!r}: expected a plain one")
    if own:
        return Path(own).expanduser() / run
    given = Path(str(job["state"])) if job["state"] else None
    # A server elsewhere must not choose a folder on this machine: it has to be here already.
    if given is None or not given.is_dir():
        raise RuntimeError(
            "this node has nowhere to keep its teacher: start it with "
            "--node-config 'state-dir=\"/path/of/this/node\"' or set FEDKD_STATE"
        )
    return given


def _student(message: Message) -> Any:
    record = message.content.array_records.get(STUDENT)
    return None if record is None else record.to_torch_state_dict()


app = make_client_app()
