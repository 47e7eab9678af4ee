"""Is this node ready? One finding per thing that has to be right, each with what to do."""

from __future__ import annotations

import re
import socket
import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from fedkd.config import ConfigError, Experiment, load_experiment
from fedkd.data.local_shard import LocalShard
from fedkd.io.records import read_json
from fedkd.privacy.policy import PolicyRefused, check_config, check_shared, explained, load_policy
from fedkd.rounds import ExperimentContext
from fedkd.runs.directory import versions
from fedkd.simulations.deploy.apps import read_apps
from fedkd.simulations.deploy.fingerprint import Fingerprint, fingerprint_of
from fedkd.simulations.deploy.folder import read_settings
from fedkd.simulations.deploy.identity import NodeKeys

TIMEOUT = 10.0
# Other versions of these refuse each other, or speak another language.
_SAME = ("fedkd", "flwr")
# Other versions of these may round the last bits differently.
_SIMILAR = ("python", "torch", "numpy")


@dataclass(frozen=True)
class Finding:
    """What was looked at, how it is, and what to do about it (empty if it is fine)."""

    what: str
    state: Literal["ok", "warning", "failed"]
    found: str
    mend: str = ""


def node_workspace(folder: Path) -> ExperimentContext:
    """What the node's config means with the node's data.

    Raises:
        ConfigError, FileNotFoundError: the data do not fit the config, or are missing.
    """
    experiment = load_experiment(folder / "experiment.yaml")
    settings = read_settings(folder / "settings.env")
    given = settings.get("PARTITION_ID") or "0"
    if not re.fullmatch("[0-9]{1,9}", given) or int(given) >= experiment.clients:
        raise ConfigError(
            f"{folder / 'settings.env'}: PARTITION_ID: expected a client, 0 to "
            f"{experiment.clients - 1}, got {given!r}"
        )
    number = int(given)
    root = settings.get("DATA_ROOT")
    data = settings.get("DATA")
    own = LocalShard(number, folder / Path(data).expanduser()) if data else None
    if experiment.data.public is not None and own is None:
        raise ConfigError("the node has no images of its own: set DATA in settings.env")
    return ExperimentContext(experiment, folder / Path(root).expanduser() if root else None, own)


def check_node(folder: Path) -> Iterator[Finding]:
    """Findings one after the other; the data come first, the network last.

    Raises:
        ConfigError: `folder` is not the folder of a node.
    """
    settings = read_settings(folder / "settings.env")
    experiment = load_experiment(folder / "experiment.yaml")
    file = folder / "fingerprint.json"
    if not file.is_file():
        raise ConfigError(
            f"{file} is missing: copy it from the machine of `fedkd deploy init`, or write it "
            "there with `fedkd deploy check NODE --print`"
        )
    expected = read_json(file, Fingerprint)
    assert expected is not None
    yield from _check_data(folder, settings, expected)
    yield from _check_policy(folder, settings, experiment)
    yield _check_app(settings, expected.get("app"))
    yield from _check_versions(expected["versions"])
    key = folder / Path(settings.get("KEY") or "node.key").expanduser()
    yield _guard("key", lambda: _check_key(key))
    if experiment.sums_securely:
        yield _check_peers(folder, settings, experiment.clients)
    yield _guard("SuperLink", lambda: _check_superlink(settings["SUPERLINK"], folder / "ca.crt"))
    yield _check_gpu(experiment)


def _check_data(folder: Path, settings: dict[str, str], expected: Fingerprint) -> Iterator[Finding]:
    where = "check DATA and DATA_ROOT in settings.env"
    try:
        space = node_workspace(folder)
        number = int(settings["PARTITION_ID"])
        shard = space.data.shard(number)
    except (ValueError, OSError, KeyError) as error:
        yield Finding("data", "failed", str(error), where)
        return
    ours = fingerprint_of(space)
    present = int((shard.class_counts() > 0).sum())
    yield Finding(
        "data", "ok",
        f"client {number} of {space.experiment.clients}: {len(shard)} images of {present} of "
        f"{len(space.data.classes)} classes to train on, "
        f"{len(space.data.holdout(number))} held out",
    )  # fmt: skip
    for mine, server, what, mend in (
        (
            ours["class_map"], expected["class_map"],
            "class map", f"the classes differ from the server's; {where}",
        ),
        (
            ours["transfer"], expected["transfer"],
            "transfer set", f"the public images differ from the server's; {where}",
        ),
    ):  # fmt: skip
        right = mine == server
        found = mine if right else f"{mine}, expected {server}"
        yield Finding(what, "ok" if right else "failed", found, "" if right else mend)


def _check_policy(
    folder: Path, settings: dict[str, str], experiment: Experiment
) -> Iterator[Finding]:
    """What the policy allows, in words, and whether the experiment runs under it."""
    place = folder / Path(settings.get("POLICY") or "policy.yaml").expanduser()
    try:
        policy = load_policy(place)
    except (ConfigError, FileNotFoundError) as error:
        fix = "write one with `fedkd deploy policy experiment.yaml > policy.yaml`"
        yield Finding("policy", "failed", str(error), fix)
        return
    for line in explained(policy):
        yield Finding("policy", "ok", line)
    try:
        check_config(policy, experiment)
        space = node_workspace(folder)
        check_shared(policy, space.shared_kinds, space.fusion, space.largest_network)
    except PolicyRefused as refusal:
        yield Finding("policy", "failed", str(refusal), f"change {place.name}, or stay out")
    except (ValueError, OSError):
        return  # the finding about the data says it


def _check_app(settings: dict[str, str], bundled: str | None) -> Finding:
    """Which code the node runs, and whether it is what the server bundles."""
    fix = "read the server's checkout, then `fedkd deploy accept . CHECKOUT`"
    try:
        apps = read_apps(settings.get("APPS", ""))
    except ConfigError as error:
        return Finding("app", "failed", str(error), fix)
    if bundled is not None and bundled not in apps:
        return Finding("app", "failed", f"the server bundles {bundled}, not accepted here", fix)
    shown = ", ".join(app[:16] for app in sorted(apps))
    return Finding("app", "ok", f"runs {shown} and no other code from the server")


def _check_versions(theirs: dict[str, str]) -> Iterator[Finding]:
    ours = versions()
    for package in (*_SAME, *_SIMILAR):
        here, there = ours.get(package), theirs.get(package)
        minor = [str(v).split(".")[:2] for v in (here, there)]
        if here == there:
            yield Finding(package, "ok", str(here))
        elif package in _SAME and (minor[0] != minor[1] or package == "fedkd"):
            mend = f"pip install '{package}=={there}'"
            if package == "fedkd":
                mend = "install the server's checkout of fedkd"
            yield Finding(package, "failed", f"{here}, the server has {there}", mend)
        else:
            yield Finding(
                package, "warning", f"{here}, the server has {there}",
                "works; the student may differ in the last bits from a simulation",
            )  # fmt: skip


def _check_key(key: Path) -> Finding:
    if not key.is_file():
        return Finding("key", "failed", f"{key} is missing", "copy it from `fedkd deploy init`")
    if key.stat().st_mode & 0o077:
        return Finding("key", "failed", "others can read it", f"chmod 600 {key}")
    return Finding("key", "ok", "only its owner can read it")


def _check_peers(folder: Path, settings: dict[str, str], clients: int) -> Finding:
    """Whether the node has the public keys of those that it sums with."""
    place = folder / Path(settings.get("PEERS") or "peers").expanduser()
    fix = "put node-K.pub of every client there, from whoever made them; PEERS in settings.env"
    try:
        NodeKeys(place, clients)
    except ConfigError as error:
        return Finding("peers", "failed", str(error), fix)
    return Finding("peers", "ok", f"keys of {clients} clients, with whom votes are summed")


def _check_superlink(address: str, ca: Path) -> Finding:
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    context = ssl.create_default_context(cafile=str(ca))
    with (
        socket.create_connection((host, int(port)), timeout=TIMEOUT) as plain,
        context.wrap_socket(plain, server_hostname=host) as channel,
    ):
        return Finding("SuperLink", "ok", f"{address} answers, {channel.version()}")


def _guard(what: str, look: Callable[[], Finding]) -> Finding:
    """The finding, or what a network or file that fails comes to."""
    try:
        return look()
    except ssl.SSLCertVerificationError as error:
        mend = (
            "take ca.crt from the same `fedkd deploy init`; SUPERLINK has to be one of its --host"
        )
        return Finding(what, "failed", f"certificate refused: {error.verify_message}", mend)
    except (OSError, ValueError, KeyError, OverflowError) as error:  # the last: port 99999
        mend = "is it started, is SUPERLINK in settings.env right, does a firewall stand between?"
        return Finding(what, "failed", str(error) or type(error).__name__, mend)


def _check_gpu(experiment: Experiment) -> Finding:
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        if experiment.resources.client_gpus > 0:
            return Finding("GPU", "ok", name)
        return Finding(
            "GPU", "warning", f"{name}, not used",
            "set resources.client_gpus above 0 to train on it",
        )  # fmt: skip
    if experiment.resources.client_gpus > 0:
        return Finding(
            "GPU", "warning", "none seen, though resources.client_gpus asks for one",
            "it will train on the CPU; check the driver and that torch is built for CUDA",
        )  # fmt: skip
    return Finding("GPU", "ok", "none, and none is asked for")
