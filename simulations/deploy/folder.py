"""The folder that `fedkd deploy init` writes: one subfolder per machine, to be copied there."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

from fedkd.config import ConfigError, Experiment
from fedkd.data.local_shard import write_private, write_public
from fedkd.knowledge.store import write_atomically
from fedkd.privacy.policy import Policy
from fedkd.rounds import ExperimentContext
from fedkd.simulations.deploy import scripts
from fedkd.simulations.deploy.apps import checkout_hash
from fedkd.simulations.deploy.fingerprint import fingerprint_of
from fedkd.simulations.deploy.keys import certificates, node_pair
from fedkd.simulations.deploy.plan import Plan

SECRET, SCRIPT, PLAIN = 0o600, 0o700, 0o644
PUBLIC = "public.npz"
PRIVATE = "private.npz"
PEERS = "peers"


def write_folder(path: Path, plan: Plan, experiment: Experiment, space: ExperimentContext) -> None:
    """Write keys, scripts, the config and a README below `path`.

    Args:
        path: A folder that does not exist or is empty.
        plan: What the federation looks like.
        experiment: What will run; it has `plan.nodes` clients, or as many and more may join.
        space: What its config means here: the source of the fingerprint and of the public images.

    Raises:
        ConfigError: `path` holds something, or cannot be written.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(f"{path} exists already: choose another folder (its keys would be lost)")
    try:
        _write_all(path, plan, experiment, space)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from None


def _write_all(path: Path, plan: Plan, experiment: Experiment, space: ExperimentContext) -> None:
    path.mkdir(parents=True, exist_ok=True)
    path.chmod(0o700)
    # The SuperLink's own helper process reaches it by loopback; without these names in the
    # certificate it ends silently and every run stays pending.
    hosts = dict.fromkeys((*plan.hosts, "localhost", "127.0.0.1"))
    ca, server = certificates(list(hosts), days=plan.days)
    config = experiment.to_yaml()
    app = checkout_hash(plan.source)
    fingerprint = json.dumps({**fingerprint_of(space), "app": app}, indent=2) + "\n"
    policy = policy_text(experiment, space)
    address = plan.address

    _put(path / "ca" / "ca.key", ca.private, SECRET)
    _put(path / "ca" / "ca.crt", ca.public, PLAIN)

    link = path / "superlink"
    _put(link / "ca.crt", ca.public, PLAIN)
    _put(link / "server.key", server.private, SECRET)
    _put(link / "server.crt", server.public, PLAIN)
    _put(link / "experiment.yaml", config, PLAIN)
    _put(link / "settings.env", scripts.server_settings(plan), SECRET)
    _put(link / "superlink.sh", scripts.SUPERLINK, SCRIPT)
    _put(link / "register.sh", scripts.REGISTER, SCRIPT)
    _put(link / "run.sh", scripts.RUN, SCRIPT)
    _put(link / "flwr.sh", scripts.FLWR, SCRIPT)
    _put(link / "fedkd-superlink.service", scripts.unit("superlink", "superlink.sh"), PLAIN)
    if plan.own_data:
        write_public(space.data, link / PUBLIC, answers=True)

    pairs = [node_pair(f"node-{number}") for number in range(plan.nodes)]
    for number, pair in enumerate(pairs):
        node = path / f"node-{number}"
        _put(node / "node.key", pair.private, SECRET)
        _put(node / "node.pub", pair.public, PLAIN)
        _put(link / "nodes" / f"node-{number}.pub", pair.public, PLAIN)
        _put(node / "ca.crt", ca.public, PLAIN)
        _put(node / "experiment.yaml", config, PLAIN)
        _put(node / "fingerprint.json", fingerprint, PLAIN)
        _put(node / "policy.yaml", policy, PLAIN)
        settings = scripts.node_settings(plan, number, app)
        if experiment.sums_securely:  # whom a node sums with is not for the server to say
            for other, known in enumerate(pairs):
                _put(node / PEERS / f"node-{other}.pub", known.public, PLAIN)
            settings += scripts.PEERS_SETTING
        _put(node / "settings.env", settings, SECRET)
        _put(node / "supernode.sh", scripts.SUPERNODE, SCRIPT)
        service = f"fedkd-supernode-{number}"
        _put(
            node / f"{service}.service", scripts.unit(f"supernode {number}", "supernode.sh"), PLAIN
        )
        if plan.own_data:
            write_public(space.data, node / PUBLIC, answers=False, client=number)
        if plan.deal:
            write_private(space.data, number, node / PRIVATE)
            (node / PRIVATE).chmod(SECRET)

    _put(path / "compose.yaml", scripts.compose(plan), PLAIN)
    _put(path / "fingerprint.json", fingerprint, PLAIN)
    _put(path / "README.md", scripts.readme(plan, experiment.name, address), PLAIN)
    for folder in (path, *(p for p in path.rglob("*") if p.is_dir())):
        folder.chmod(0o700)


def policy_text(experiment: Experiment, space: ExperimentContext) -> str:
    """The strictest policy under which an experiment runs, as a file for its owner to edit."""
    policy = Policy.of(experiment, space.shared_kinds, space.fusion, space.largest_network)
    return f"""\
# What this node allows, whatever the server's messages ask for. It is the owner's to change; no
# message does. What a list does not name is refused. This is the strictest policy under which the
# experiment {experiment.name!r} runs; with a promise, once: promise.epsilon is what all runs on
# these images may spend together.
{policy.to_yaml()}"""


def read_settings(path: Path) -> dict[str, str]:
    """The `KEY=value` lines of a settings.env."""
    if not path.is_file():
        raise ConfigError(f"{path} is missing: expected a folder that `fedkd deploy init` wrote")
    try:
        words = shlex.split(path.read_text(encoding="utf-8"), comments=True)
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: not a text file in UTF-8 ({error.reason} at byte {error.start})"
        ) from None
    except ValueError as error:
        raise ConfigError(
            f"{path}: expected lines KEY=value as a shell reads them ({error})"
        ) from None
    return {key: value for key, _, value in (word.partition("=") for word in words)}


def accept(node: Path, app: str, *, keep: bool) -> tuple[str, ...]:
    """Make `app` the one that a node runs, in its settings.env.

    Returns:
        All apps that are accepted now.
    """
    path = node / "settings.env"
    before = read_settings(path).get("APPS", "").split() if keep else []
    apps = tuple(dict.fromkeys([*before, app]))
    line = f"APPS={shlex.quote(' '.join(apps))}"
    text = path.read_text(encoding="utf-8")
    text, found = re.subn(r"(?m)^APPS=.*$", lambda _: line, text)
    write_atomically(path, (text if found else f"{text}{line}\n").encode(), private=True)
    return apps


def _put(path: Path, content: str | bytes, mode: int) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.touch(mode=mode, exist_ok=False)
    path.chmod(mode)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def deployable(experiment: Experiment, plan: Plan) -> list[str]:
    """Overrides that make an experiment fit for real nodes. Raises `ConfigError` if none can."""
    if experiment.data.label_noise is not None:
        raise ConfigError(
            "data.label_noise: real nodes train on the labels that they have, and refuse it; leave "
            "it out (data.label_noise=null)"
        )
    # Nodes come up over minutes, and come back so after a restart of the SuperLink.
    changes = [f"federation.wait={max(experiment.federation.wait, 600.0)}"]
    if plan.own_data:
        kept = [name for name in experiment.evaluation.baselines if name != "ceiling"]
        changes += [f"evaluation.baselines=[{', '.join(kept)}]", f"data.public={PUBLIC}"]
        changes += ["data.domains=null"]  # the images that are written are in theirs
    return changes
