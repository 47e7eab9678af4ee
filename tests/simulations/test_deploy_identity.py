"""A node is the client whose key it holds, whatever it says."""

import json
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from flwr.app import ConfigRecord

from fedkd.config import ConfigError, Experiment
from fedkd.rounds import ExperimentContext, experiment_context
from fedkd.runs.directory import RunDirectory
from fedkd.simulations.client_app import make_client_app
from fedkd.simulations.deploy.folder import policy_text
from fedkd.simulations.deploy.identity import NodeKeys, proof
from fedkd.simulations.deploy.keys import node_pair
from fedkd.simulations.job import run_job
from fedkd.simulations.local import LocalGrid, run_local
from fedkd.strategies.records import SIGNATURE
from tests.conftest import Tiny


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """A folder with the key pairs of three nodes, and one that nobody registered."""
    folder = tmp_path / "nodes"
    folder.mkdir()
    for name in ("node-0", "node-1", "node-2", "evil"):
        pair = node_pair(name)
        (tmp_path / f"{name}.key").write_bytes(pair.private)
        if name != "evil":
            (folder / f"{name}.pub").write_bytes(pair.public)
    return folder


def claim(client: object, signature: object = None) -> dict[str, object]:
    return {"client": client} | ({} if signature is None else {SIGNATURE: signature})


def test_only_the_key_of_a_client_proves_it_for_this_run_node_and_challenge(keys: Path) -> None:
    known = NodeKeys(keys, 3)
    nonce = known.challenge()
    key = keys.parent / "node-1.key"
    good = proof(key, nonce, "run", 7, 1)
    assert known.problem(claim(1, good), nonce, "run", 7) is None
    other = proof(keys.parent / "node-2.key", nonce, "run", 7, 1)
    stale = proof(key, known.challenge(), "run", 7, 1)
    for facts, node, run in (
        (claim(1, other), 7, "run"),  # another node's key
        (claim(1, stale), 7, "run"),  # an answer to another challenge
        (claim(1, good), 8, "run"),  # passed on by another node
        (claim(1, good), 7, "next"),  # of another run
        (claim(2, good), 7, "run"),  # for another number
        (claim(1, b""), 7, "run"),
        (claim(1, good[:-1]), 7, "run"),
    ):
        assert "without the key of" in str(known.problem(facts, nonce, run, node))


@pytest.mark.parametrize("client", [3, -1, True, "1", 1.0, None])
def test_a_number_without_a_key_is_nobody(keys: Path, client: object) -> None:
    assert "has no key" in str(NodeKeys(keys, 3).problem(claim(client), b"n", "run", 7))


def test_a_claim_without_a_signature_names_the_setting(keys: Path) -> None:
    problem = NodeKeys(keys, 3).problem(claim(1, "text"), b"n", "run", 7)
    assert "KEY in settings.env" in str(problem)


def test_keys_that_are_missing_doubled_or_none_are_refused_before_the_run(keys: Path) -> None:
    with pytest.raises(ConfigError, match="client 3 has none"):
        NodeKeys(keys, 4)
    (keys / "node-2.pub").write_bytes((keys / "node-0.pub").read_bytes())
    with pytest.raises(ConfigError, match=r"node-2\.pub: the key of node-0\.pub"):
        NodeKeys(keys, 3)
    others = (
        ed25519.Ed25519PrivateKey.generate().public_key(),
        ec.generate_private_key(ec.SECP256R1()).public_key(),
    )
    form = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    for line in (b"", b"ssh-rsa nonsense", *(other.public_bytes(*form) for other in others)):
        (keys / "node-2.pub").write_bytes(line)
        with pytest.raises(ConfigError, match=r"node-2\.pub: expected a node's public key"):
            NodeKeys(keys, 3)


def federation(
    experiment: Experiment, keys: Path, tmp_path: Path, nodes: list[dict[str, Any]]
) -> tuple[dict[str, Any], RunDirectory]:
    """Summary and folder of a run with keys on in-process nodes with these node configs."""
    policy = tmp_path / "policy.yaml"
    policy.write_text(policy_text(experiment, ExperimentContext(experiment)))
    grid = LocalGrid(make_client_app(), len(nodes))
    for number, extra in enumerate(nodes):
        state = {"state-dir": str(tmp_path / f"state-{number}"), "policy": str(policy)}
        grid._contexts[1000 - number].node_config.update(state | extra)
    run = RunDirectory.new(experiment)
    space = experiment_context(experiment)
    known = NodeKeys(keys, experiment.clients)
    return run_job(grid, run, space, simulated=False, keys=known), run


def test_nodes_that_prove_who_they_are_reach_the_student_of_the_simulation(
    tmp_path: Path, tiny: Tiny, keys: Path
) -> None:
    experiment = tiny("rounds=1", "evaluation.baselines=[]")
    nodes = [{"key": str(keys.parent / f"node-{number}.key")} for number in range(3)]
    summary, _ = federation(experiment, keys, tmp_path, nodes)
    assert summary["refused"] == []
    assert summary["hash"] == run_local(experiment).read_json("summary.json")["hash"]


@pytest.mark.parametrize("key", ["node-2.key", "evil.key", ""])
def test_an_impostor_is_a_stranger_and_the_true_node_takes_part(
    tmp_path: Path, tiny: Tiny, keys: Path, key: str
) -> None:
    # Node 2 is asked first (its id is the lowest) and says that it is client 0.
    experiment = tiny("rounds=1", "evaluation.baselines=[]", "federation.quorum=0.5")
    nodes = [{"key": str(keys.parent / f"node-{number}.key")} for number in range(3)]
    nodes[2] = {"partition-id": 0, "key": str(keys.parent / key) if key else ""}
    summary, run = federation(experiment, keys, tmp_path, nodes)
    (refused,) = summary["refused"]
    assert (refused["phase"], refused["client"]) == ("describe", 0)
    assert "node 998 claims to be client 0" in refused["reason"]
    rows = [json.loads(line) for line in (run.path / "ledger.jsonl").read_text().splitlines()]
    answered = {row["client"] for row in rows if row["phase"] == "train"}
    assert answered == {0, 1}


def test_a_simulation_asks_for_no_signature(
    tmp_path: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[set[str]] = []

    def look(message: Any, context: Any, call: Any) -> Any:
        if message.metadata.message_type == "query.describe":
            asked.append(set(message.content))
            reply = call(message, context)
            facts = reply.content["describe"]
            assert isinstance(facts, ConfigRecord)
            assert SIGNATURE not in facts
            return reply
        return call(message, context)

    run_local(tiny("rounds=1", "evaluation.baselines=[]"), client_app=make_client_app(mods=[look]))
    assert asked == [{"job"}] * 3
