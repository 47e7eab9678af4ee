"""The Flower ClientApp: messages in, `fedkd.rounds.Client` does the work, messages out."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedkd import __version__
from fedkd.config import Experiment, import_plugins
from fedkd.data.local_shard import LocalShard, write_private, write_public
from fedkd.data.splits import same_transfer
from fedkd.knowledge.query import Images
from fedkd.knowledge.store import write_atomically
from fedkd.privacy.masking import key_pair
from fedkd.privacy.policy import (
    Policy,
    PolicyRefused,
    check_config,
    check_shared,
    judges,
    load_policy,
)
from fedkd.rounds import (
    Client,
    ExperimentContext,
    computing,
    experiment_context,
    train_together,
)
from fedkd.rounds.context import received_experiment
from fedkd.rounds.secure_sum import Signed, SumRefused, key_statement, masked_votes
from fedkd.simulations.deploy.identity import NodeKeys, proof, signature_of
from fedkd.strategies.groups import joined, members
from fedkd.strategies.records import (
    CHALLENGE,
    JOB,
    MEMBERS,
    MESSAGES_OWN,
    METRICS,
    NAMED,
    SIGNATURE,
    STUDENT,
    UNKNOWN,
    WEIGHTS,
    job_digest,
    other_weights,
    reply_records,
)
from fedkd.strategies.secure_sum import RECORD, read_roster
from fedkd.training.loop import time_limit
from fedkd.training.supervised import Fit


def make_client_app(mods: Sequence[Any] = ()) -> ClientApp:
    """The app of the six questions; `mods` wrap every message, as those of any Flower app do."""
    return add_client(ClientApp(), mods)


def add_client(app: ClientApp, mods: Sequence[Any] = ()) -> ClientApp:
    """Let an app, which may have functions of its own, answer the six questions too.

    They are `query.describe`, `train`, `query.knowledge`, `query.keys`, `query.masked` and
    `evaluate`.

    Args:
        app: A ClientApp of the message API.
        mods: They wrap the six only, and see a message with its whole job. Mods of `app` itself
            see it as it travels.

    Returns:
        `app`.

    Raises:
        ValueError: `app` has one of these functions already, or a mod is made for model updates.
    """
    for mod in mods:
        _check_mod(mod)
    wrapped = [_with_its_job, *mods]
    try:
        app.query("describe", mods=wrapped)(_describe)
        app.train(mods=wrapped)(_train)
        app.query("knowledge", mods=wrapped)(_answer)
        app.query("keys", mods=wrapped)(_offer_key)
        app.query("masked", mods=wrapped)(_vote)
        app.evaluate(mods=wrapped)(_evaluate)
    except ValueError as error:  # Flower's
        raise ValueError(
            f"this ClientApp cannot take in fedkd's client, which answers query.describe, train, "
            f"query.knowledge, query.keys, query.masked and evaluate: {str(error).splitlines()[0]} "
            'Give functions of yours names, as in @app.train("mine")'
        ) from None
    return app


# They change the weights that a reply has in common with its message. Here replies have none.
_OF_UPDATES = {
    "fixedclipping_mod": "DP-SGD is teachers.privacy",
    "adaptiveclipping_mod": "DP-SGD is teachers.privacy",
    "LocalDpMod": "private answers are release",
    "secagg_mod": "secure aggregation of votes is release.secure",
    "secaggplus_mod": "secure aggregation of votes is release.secure",
}


def _check_mod(mod: Any) -> None:
    name = getattr(mod, "__name__", type(mod).__name__)
    module = getattr(mod, "__module__", None) or ""
    if name in _OF_UPDATES and module.startswith("flwr."):
        raise ValueError(
            f"mods: {name} is made for model updates, and a client of fedkd sends none "
            f"({_OF_UPDATES[name]})"
        )


def _with_its_job(
    message: Message, context: Context, call_next: Callable[[Message, Context], Message]
) -> Message:
    """Complete the job of a message from what was kept of the last whole one, and keep that.

    Flower keeps a node's state until the node ends: started anew, it answers that it does not know
    the job, and is sent it whole. Whatever is checked of a job is checked of either.
    """
    job = message.content.config_records.get(JOB, ConfigRecord())
    context, named = _played(job, context), job.get(NAMED)
    if named is None:
        kept = {name: value for name, value in job.items() if name not in MESSAGES_OWN}
        context.state[JOB] = ConfigRecord(kept)
        return call_next(message, context)
    known = context.state.config_records.get(JOB)
    if known is None or job_digest(known) != named:
        return Message(RecordDict({UNKNOWN: ConfigRecord({NAMED: named})}), reply_to=message)
    own = {name: job[name] for name in MESSAGES_OWN if name in job}
    message.content = RecordDict({**message.content, JOB: ConfigRecord({**known, **own})})
    return call_next(message, context)


def _played(job: ConfigRecord, context: Context) -> Context:
    """The context of the client that a node of a large simulation is asked to play."""
    clients = job.get(MEMBERS)
    if not isinstance(clients, list) or len(clients) != 1 or _own_state(context.node_config):
        return context
    played = copy(context)
    played.node_config = {**context.node_config, "partition-id": int(clients[0])}
    return played


def _describe(message: Message, context: Context) -> Message:
    """Who this node is, and what it makes of the config."""
    client, _ = _client(message, context)
    facts = ConfigRecord(
        {
            "client": client.number,
            "partitions": int(context.node_config.get("num-partitions", 0)),
            "fingerprint": client.context.data.fingerprint,
            "class_map": client.context.class_map,
            "fedkd": __version__,
        }
    )
    if client.context.weights:
        facts[WEIGHTS] = json.dumps(client.context.weights, sort_keys=True)
    signature = _signature(message, context, client.number)
    if signature is not None:
        facts[SIGNATURE] = signature
    return Message(RecordDict({"describe": facts}), reply_to=message)


def _train(message: Message, context: Context) -> Message:
    """Train the node's client, or in a simulation a group of clients."""
    group = members(message)
    if group and _own_state(context.node_config):
        raise PolicyRefused("asked to train for other clients; a node trains for itself alone")
    numbers: list[int | None] = [*group] or [None]  # none: the one that the node plays
    asked = [_client(message, context, number) for number in numbers]
    clients, (client, round_number) = [each for each, _ in asked], asked[0]
    limits = client.limits
    _check_disk(context.node_config, limits.disk_mb)
    with (
        computing(client.experiment.resources, client.experiment.resources.client_cpus),
        time_limit(limits.seconds),
    ):
        fits = train_together(clients, round_number, _student(message))
    results = {
        client.number: _training_record(client, round_number, fit)
        for client, fit in zip(clients, fits, strict=True)
    }
    if len(group) > 1:
        return Message(joined(results), reply_to=message)
    (result,) = results.values()
    if isinstance(result, Exception):
        raise result
    return Message(result, reply_to=message)


def _training_record(
    client: Client, round_number: int, fit: Fit | Exception
) -> RecordDict | Exception:
    """What a client reports of its training."""
    if isinstance(fit, Exception):
        return fit
    # Measured on private images, and disclosed to the server like everything in a reply: so only
    # where nothing is promised about them.
    known = {"loss": fit.loss, "accuracy": fit.accuracy}  # unknown for an empty shard
    metrics = {name: value for name, value in known.items() if math.isfinite(value)}
    try:
        if (spent := client.budget.spent) is not None:
            metrics = {"epsilon": spent, "trained": float(client.budget.paid(round_number))}
        elif client.experiment.release is not None:
            metrics = {}
    except Exception as error:  # its account; the others of a group have their own
        return error
    return RecordDict({METRICS: MetricRecord({**metrics})})


def _answer(message: Message, context: Context) -> Message:
    """The teacher's answers about the images that the student learns from."""
    client, round_number = _client(message, context)
    base = int(message.content.config_records[JOB].get("base", 0))  # type: ignore[arg-type]
    with computing(client.experiment.resources, client.experiment.resources.client_cpus):
        content = _replies(client, round_number, client.context.learning_images, base)
    return Message(content, reply_to=message)


def _evaluate(message: Message, context: Context) -> Message:
    """The teacher's answers about the test images, and a verdict on the student."""
    client, round_number = _client(message, context)
    student = _student(message)
    with computing(client.experiment.resources, client.experiment.resources.client_cpus):
        content = _replies(client, round_number, client.context.scoring_images)
        if student is not None:
            # Whatever the message carries: hits on private images are a fact about them.
            if not judges(client.experiment):
                raise PolicyRefused(
                    "asked to judge a student on private images, which the run's config rules "
                    "out (evaluation.clients, or a promise)"
                )
            content[METRICS] = MetricRecord({**client.judge(student)})
    return Message(content, reply_to=message)


def _offer_key(message: Message, context: Context) -> Message:
    """A fresh public key for one secure sum, signed with the node's key if it has one."""
    client, round_number = _client(message, context)
    if not client.context.sums_securely:
        raise PolicyRefused("asked for a key, and the run's release does not sum securely")
    attempt = message.content.config_records.get(RECORD, ConfigRecord()).get("attempt")
    if not isinstance(attempt, int):
        raise RuntimeError("asked for a key without the number of the sum")
    private, public = key_pair()
    answer = ConfigRecord({"key": public})
    if client.peers is not None:
        place = Path(str(context.node_config["key"])).expanduser()
        statement = key_statement(client.run, round_number, attempt, client.number, public)
        answer["signature"] = signature_of(place, statement)
    # In the node's memory until it is used: never on disk.
    context.state[_secret(client)] = ConfigRecord(
        {"private": private, "round": round_number, "attempt": attempt}
    )
    return Message(RecordDict({RECORD: answer}), reply_to=message)


def _vote(message: Message, context: Context) -> Message:
    """The teacher's votes under noise and masks, once under each key."""
    client, round_number = _client(message, context)
    if not client.context.sums_securely:
        raise PolicyRefused("asked for masked votes, and the run's release does not sum securely")
    roster = read_roster(message.content)
    secret = context.state.config_records.get(_secret(client), ConfigRecord())
    if (secret.get("round"), secret.get("attempt")) != (round_number, roster.attempt):
        raise SumRefused(
            f"client {client.number} has no key for sum {roster.attempt} of round {round_number}: "
            "it was used, or the node was started anew"
        )
    del context.state[_secret(client)]
    with computing(client.experiment.resources, client.experiment.resources.client_cpus):
        private = bytes(secret["private"])  # type: ignore[arg-type]
        values = masked_votes(client, round_number, roster, private, client.peers)
    answer = ConfigRecord({"values": values.astype("<u4").tobytes()})
    return Message(RecordDict({RECORD: answer}), reply_to=message)


def _secret(client: Client) -> str:
    """Name of the record with a client's key, in the state of a node that may play several."""
    return f"sum.{client.number}"


def _peers(node: Mapping[str, Any], experiment: Experiment) -> Signed | None:
    """Checks the other clients' signatures; None in a simulation, where nobody has a key.

    The public keys lie with this node, and came with it: the server could deal keys of its own.
    """
    release = experiment.release
    if not _own_state(node) or release is None or release.options.get("secure") is None:
        return None
    folder = node.get("peers")
    if not folder or not node.get("key"):
        raise PolicyRefused(
            "release.secure: this node does not know the other clients' keys: put node-K.pub of "
            "each into a folder and name it by PEERS in settings.env"
        )
    return NodeKeys(Path(str(folder)).expanduser(), 0).signed


def _signature(message: Message, context: Context, client: int) -> bytes | None:
    """The node's signature under who it is, if the server asks for one and the node has a key."""
    asked = message.content.config_records.get(CHALLENGE)
    challenge = None if asked is None else asked.get(CHALLENGE)
    key = context.node_config.get("key")
    if not isinstance(challenge, bytes) or not key:
        return None
    run = str(message.content.config_records[JOB]["run"])
    return proof(Path(str(key)).expanduser(), challenge, run, context.node_id, client)


def _client(message: Message, context: Context, number: int | None = None) -> tuple[Client, int]:
    """The client this node plays, or another one, and the round it is asked about."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    job = message.content.config_records[JOB]
    node = context.node_config
    if "partition-id" not in node:
        raise RuntimeError(
            "this node does not know which client it is: start it with "
            "--node-config 'partition-id=0 num-partitions=8'"
        )
    run = _run_name(job)
    number = int(node["partition-id"]) if number is None else number
    root = node.get("data-root") or _given_root(node, job) or os.environ.get("FEDKD_DATA") or None
    state = _state_dir(node, job, run)
    folder = state / f"client-{number:04d}"
    policy = _policy(node)
    experiment = _experiment(job, policy, state)
    space = _space(job, experiment, str(root) if root else None, number, node, folder)
    if policy is not None:
        check_shared(policy, space.shared_kinds, space.fusion, space.largest_network)
    ours, theirs = space.data.fingerprint, str(job["fingerprint"])
    # Asked who it is, a node answers all the same: the server then names it and its reason.
    if message.metadata.message_type != "query.describe":
        if not same_transfer(ours, theirs):
            raise RuntimeError(f"client {number} has transfer set {ours!r}, the server {theirs!r}")
        if (other := other_weights(space.weights, job.get(WEIGHTS))) is not None:
            raise RuntimeError(
                f"client {number} begins with other weights than the server in {other}"
            )
    budgets = None if policy is None else state.parent / "budgets"
    client = Client(
        space,
        number,
        run,
        folder,
        policy=policy,
        budgets=budgets,
        peers=_peers(node, space.experiment),
    )
    return client, int(job["round"])  # type: ignore[arg-type]


def _run_name(job: ConfigRecord) -> str:
    """The run that the message is about; it names a folder here, so it climbs nowhere."""
    run = job["run"]
    if not isinstance(run, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}", run):
        raise RuntimeError("the server's run has no plain name (letters, digits, `.`, `_`, `-`)")
    return run


def _policy(node: Mapping[str, Any]) -> Policy | None:
    """This node's own terms; none in a simulation, where the config is the owner's."""
    if not _own_state(node):
        return None
    place = node.get("policy") or os.environ.get("FEDKD_POLICY")
    if not place:
        raise PolicyRefused(
            "this node has no policy, so it does nothing: write one with `fedkd deploy policy "
            "CONFIG` and start the node with --node-config 'policy=\"/path/of/policy.yaml\"'"
        )
    return load_policy(Path(str(place)).expanduser())


def _experiment(job: ConfigRecord, policy: Policy | None, state: Path) -> Experiment:
    """The config of the message: allowed here, and the one that the run began with."""
    sent = job["config"]
    if not isinstance(sent, bytes):
        raise RuntimeError("the server uses an older protocol: install its version of fedkd here")
    experiment = received_experiment(sent)
    if policy is not None:
        check_config(policy, experiment)
        place, ours = state / "config.sha256", hashlib.sha256(sent).hexdigest()
        if not place.is_file():
            write_atomically(place, ours.encode(), private=True)
        elif place.read_text(encoding="utf-8") != ours:
            raise PolicyRefused(
                f"the config of run {state.name} is not the one of its first message; a run's "
                "config cannot be changed"
            )
    import_plugins(experiment.plugins)
    return experiment


def _check_disk(node: Mapping[str, Any], limit: float | None) -> None:
    state = _own_state(node)
    if state is None or limit is None:
        return
    files = (path for path in Path(state).expanduser().rglob("*") if path.is_file())
    used = sum(path.stat().st_size for path in files) / 2**20
    if used > limit:
        raise PolicyRefused(
            f"limits.disk_mb: {used:.0f} MB are used, this node allows {limit:g}: its owner may "
            "remove the folders of finished runs"
        )


def _replies(
    client: Client, round_number: int, asked: Sequence[Images], base: int = 0
) -> RecordDict:
    """The client's replies about the images that it is asked about."""
    if client.context.sums_securely:
        raise PolicyRefused(
            "asked for answers, and the run promises that they leave this client in a secure sum "
            "alone (release.secure)"
        )
    content, size = RecordDict(), 0
    for images in asked:
        held = base if images is Images.TRANSFER else 0
        reply = client.answer(images, round_number, base=held)
        size += sum(array.nbytes for array in reply.arrays.values())
        content.update(reply_records(images, reply))
    limit = client.limits.payload_mb
    if limit is not None and size / 2**20 > limit:
        raise PolicyRefused(f"limits.payload_mb: {size / 2**20:.1f} MB, this node allows {limit:g}")
    return content


def _space(
    job: ConfigRecord,
    experiment: Experiment,
    root: str | None,
    number: int,
    node: Any,
    folder: Path,
) -> ExperimentContext:
    """What the config means on this node.

    A real node starts a process for every message. It keeps its part of the split beside its
    teachers, so that only the first message of a run reads and deals the data set.
    """
    kept = LocalShard(number, folder / "private.npz", folder / "public.npz")
    alone = number if _own_state(node) else None
    if kept.public is not None and kept.public.is_file():
        return experiment_context(experiment, root, kept, alone)
    data = node.get("data")
    own = LocalShard(number, Path(str(data)).expanduser()) if data else None
    space = experiment_context(experiment, root, own, alone)
    if space.experiment.data.public is not None and own is None:
        raise RuntimeError(
            f"client {number} has no images of its own, and the experiment deals none: start the "
            "node with --node-config 'data=\"/path/of/its/images\"'"
        )
    fits = same_transfer(space.data.fingerprint, str(job["fingerprint"])) and number in range(
        space.experiment.clients
    )
    if kept.public is not None and _own_state(node) and fits:
        write_private(space.data, number, kept.private)
        write_public(space.data, kept.public, answers=False, client=number)
    return space


def _given_root(node: Any, job: ConfigRecord) -> str | None:
    """Where a simulation's images are, if the server found them elsewhere than a client would.

    A real node has a state folder of its own; no path of the server is meant for it.
    """
    given = str(job.get("data-root") or "")
    return given if given and not _own_state(node) and Path(given).is_dir() else None


def _own_state(node: Mapping[str, Any]) -> str | None:
    return node.get("state-dir") or os.environ.get("FEDKD_STATE") or None


def _state_dir(node: Mapping[str, Any], job: ConfigRecord, run: str) -> Path:
    """Where this node keeps its teachers: its own choice, else the simulation's run directory.

    The server chooses neither.
    """
    if own := _own_state(node):
        return Path(own).expanduser() / run
    given = Path(str(job["state"])) if job["state"] else None
    # A server elsewhere must not choose a folder on this machine: it has to be that of a run.
    if (
        given is None
        or (given.parent.name, given.name) != (run, "clients")
        or not (given.parent / "config.yaml").is_file()
    ):
        raise RuntimeError(
            "this node has nowhere to keep its teacher: start it with "
            "--node-config 'state-dir=\"/path/of/this/node\"' or set FEDKD_STATE (in a Ray "
            "cluster: let `output` be a folder that all machines share)"
        )
    return given


def _student(message: Message) -> Any:
    record = message.content.array_records.get(STUDENT)
    return None if record is None else record.to_torch_state_dict()


app = make_client_app()
