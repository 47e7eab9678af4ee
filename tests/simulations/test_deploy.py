"""`fedkd deploy init` and `check`, `fedkd status`, and nodes that hold their own images only."""

import json
import re
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from flwr.app import Context, Error, Message
from PIL import Image
from typer.testing import CliRunner

from fedkd.build import build_data
from fedkd.config import ConfigError, Experiment, make_experiment
from fedkd.data.local_shard import LocalShard, write_private, write_public
from fedkd.rounds import ExperimentContext
from fedkd.runs.directory import RunDirectory
from fedkd.runs.events import MessageCounted, ReplyRefused, RoundFinished
from fedkd.simulations.cli.main import app
from fedkd.simulations.cli.status import status_of
from fedkd.simulations.client_app import make_client_app
from fedkd.simulations.deploy import plan, scripts
from fedkd.simulations.deploy.check import check_node
from fedkd.simulations.deploy.folder import policy_text
from fedkd.simulations.deploy.keys import certificates, node_pair
from fedkd.simulations.deploy.plan import Plan
from fedkd.simulations.job import run_job
from fedkd.simulations.local import LocalGrid, run_local
from tests.conftest import TINY, Tiny


def fedkd(*words: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, list(words), catch_exceptions=True)
    if isinstance(done.exception, ConfigError):
        return 2, str(done.exception)
    return done.exit_code, done.output


def make(folder: Path, experiment: Experiment, *words: str) -> Path:
    config = folder.parent / "tiny.yaml"
    config.write_text(experiment.to_yaml())
    code, output = fedkd(
        "deploy", "init", str(folder), "--nodes", "3", "--host", "localhost", "--host", "127.0.0.1",
        "--config", str(config), *words,
    )  # fmt: skip
    assert code == 0, output
    return folder


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of `fedkd deploy init`; who changes something in it copies it before."""
    folder = tmp_path_factory.mktemp("deployment") / "dep"
    return make(folder, make_experiment(TINY, ["clients=5"]), "--host", "fedkd.example.org")


# -- keys ----------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[int, Path]]:
    """(port, CA file) of a TLS server with the certificate of a SuperLink on localhost."""
    ca, own = certificates(["localhost", "127.0.0.1", "::1"], days=2)
    for name, content in (("ca", ca.public), ("crt", own.public), ("key", own.private)):
        (tmp_path / name).write_bytes(content)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "crt", tmp_path / "key")
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    plain, _ = listener.accept()
                except OSError:
                    return
                try:
                    context.wrap_socket(plain, server_side=True).close()
                except OSError:
                    plain.close()

        threading.Thread(target=serve, daemon=True).start()
        yield listener.getsockname()[1], tmp_path / "ca"
        listener.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize(("name", "fits"), [("localhost", True), ("127.0.0.1", True), ("b.org", 0)])
def test_the_certificate_holds_for_its_hosts_and_no_others(
    server: tuple[int, Path], name: str, fits: bool
) -> None:
    context = ssl.create_default_context(cafile=str(server[1]))
    with socket.create_connection(("127.0.0.1", server[0]), timeout=10) as plain:
        if fits:
            context.wrap_socket(plain, server_hostname=name).close()
        else:
            with pytest.raises(ssl.SSLCertVerificationError, match="not valid for"):
                context.wrap_socket(plain, server_hostname=name)


def test_the_ca_signs_the_server_and_may_sign_nothing_below_it() -> None:
    pairs = certificates(["a.org", "10.0.0.1", "fe80::1"], days=7)
    ca, own = (x509.load_pem_x509_certificate(pair.public) for pair in pairs)
    own.verify_directly_issued_by(ca)
    names = own.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["a.org"]
    assert [str(a) for a in names.get_values_for_type(x509.IPAddress)] == ["10.0.0.1", "fe80::1"]
    assert ca.extensions.get_extension_for_class(x509.BasicConstraints).value.path_length == 0
    assert not own.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert (own.not_valid_after_utc - own.not_valid_before_utc).days == 7


def test_a_node_key_is_openssh_on_a_nist_curve() -> None:
    pair = node_pair("node-0")
    key: Any = serialization.load_ssh_private_key(pair.private, None)
    assert key.curve.name == "secp384r1"
    assert pair.public.startswith(b"ecdsa-sha2-nistp384 ")
    assert node_pair("node-0").private != pair.private


# -- init ----------------------------------------------------------------------------------


def test_init_writes_secrets_for_their_owner_only(deployment: Path) -> None:
    folder = deployment
    modes = {p.relative_to(folder).as_posix(): p.stat().st_mode & 0o777 for p in folder.rglob("*")}
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {modes[name] for name in modes if name.endswith(".key")} == {0o600}
    assert {m for n, m in modes.items() if (folder / n).is_dir()} == {0o700}
    assert {m for n, m in modes.items() if n.endswith(".sh")} == {0o700}
    keys = {(folder / f"node-{number}" / "node.key").read_bytes() for number in range(3)}
    assert len(keys) == 3
    # No machine gets a key that is not its own.
    assert [n for n in modes if n.endswith(".key") and n.startswith("superlink")] == [
        "superlink/server.key"
    ]


def test_the_certificate_of_init_holds_for_the_servers_own_helper(deployment: Path) -> None:
    # Flower's helper process reaches the SuperLink at 127.0.0.1; refused, it ends without a word.
    pem = (deployment / "superlink" / "server.crt").read_bytes()
    names = x509.load_pem_x509_certificate(pem).extensions.get_extension_for_class(
        x509.SubjectAlternativeName
    )
    assert names.value.get_values_for_type(x509.DNSName) == ["localhost", "fedkd.example.org"]
    assert [str(a) for a in names.value.get_values_for_type(x509.IPAddress)] == ["127.0.0.1"]


def test_init_overwrites_nothing(deployment: Path) -> None:
    before = (deployment / "ca" / "ca.key").read_bytes()
    config = str(deployment.parent / "tiny.yaml")
    words = ("deploy", "init", str(deployment), "--nodes", "3", "--host", "a", "--config", config)
    code, output = fedkd(*words)
    assert code == 2
    assert "exists already" in output
    assert (deployment / "ca" / "ca.key").read_bytes() == before


@pytest.mark.parametrize("host", ["a.org:8443", "https://a.org", "a b", "-a", "$(id)", ""])
def test_a_host_is_a_name_or_an_address(host: str) -> None:
    with pytest.raises(ConfigError, match="--host"):
        Plan(2, (host,))


def test_scripts_compose_file_and_units_are_well_formed(deployment: Path) -> None:
    folder = deployment
    scripts = sorted(folder.rglob("*.sh"))
    assert len(scripts) == 4 + 3
    for script in scripts:
        subprocess.run(["sh", "-n", script], check=True)
    compose = yaml.safe_load((folder / "compose.yaml").read_text())
    assert set(compose["services"]) == {"superlink", "node-0", "node-1", "node-2"}
    assert compose["services"]["superlink"]["networks"]["default"]["aliases"] == ["localhost"]
    assert compose["services"]["node-2"]["command"] == ["/deploy/supernode.sh"]
    units = sorted(folder.rglob("*.service"))
    assert len(units) == 4
    assert all(
        "[Service]\n" in u.read_text() and 'ExecStart="FOLDER/' in u.read_text() for u in units
    )


@pytest.mark.parametrize(("output", "code"), [("Public key already in use.", 0), ("No.", 1)])
def test_registering_again_goes_on_to_the_new_keys(tmp_path: Path, output: str, code: int) -> None:
    (tmp_path / "nodes").mkdir()
    for name in ("node-0", "node-1"):
        (tmp_path / "nodes" / f"{name}.pub").touch()
    (tmp_path / "register.sh").write_text(scripts.REGISTER)
    (tmp_path / "flwr.sh").write_text(
        f"""#!/bin/sh
case "$*" in *node-0*) echo "{output}"; exit 1 ;; *) echo "$*" >> asked ;; esac
"""
    )
    (tmp_path / "flwr.sh").chmod(0o700)
    done = subprocess.run(["sh", str(tmp_path / "register.sh")], capture_output=True, check=False)
    assert done.returncode == code
    asked = tmp_path / "asked"
    assert (asked.is_file() and "node-1.pub" in asked.read_text()) == (code == 0)


def test_init_takes_the_checkout_that_one_stands_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after `pip install`: the packages themselves lie in no checkout."""
    monkeypatch.setattr(plan, "__file__", str(tmp_path / "a" / "b" / "c" / "plan.py"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="is no checkout of fedkd"):
        Plan(2, ("localhost",))
    (tmp_path / "simulations").mkdir()
    (tmp_path / "pyproject.toml").touch()
    assert Plan(2, ("localhost",)).source == tmp_path


def test_the_deployed_experiment_has_a_client_per_node_and_waits_for_them(deployment: Path) -> None:
    config = yaml.safe_load((deployment / "superlink" / "experiment.yaml").read_text())
    assert (config["clients"], config["federation"]["wait"]) == (3, 600.0)


# -- check ---------------------------------------------------------------------------------


def states(folder: Path) -> dict[str, str]:
    return {finding.what: finding.state for finding in check_node(folder)}


def test_check_finds_a_ready_node_ready(
    tmp_path: Path, tiny: Tiny, server: tuple[int, Path]
) -> None:
    folder = make(tmp_path / "dep", tiny(), "--port", str(server[0]))
    node = folder / "node-1"
    shutil.copy(server[1], node / "ca.crt")
    assert set(states(node).values()) == {"ok"}
    code, output = fedkd("deploy", "check", str(node))
    assert code == 0, output
    assert "client 1 of 3" in output
    code, output = fedkd("deploy", "check", str(node), "--print")
    expected = json.loads((node / "fingerprint.json").read_text())
    # Which code the server bundles is known where its checkout is.
    assert json.loads(output) == {key: expected[key] for key in expected if key != "app"}


def test_check_names_what_is_wrong_and_what_to_do(
    tmp_path: Path, tiny: Tiny, server: tuple[int, Path]
) -> None:
    node = make(tmp_path / "dep", tiny(), "--port", str(server[0])) / "node-0"
    node.joinpath("node.key").chmod(0o644)
    facts = json.loads((node / "fingerprint.json").read_text())
    facts["transfer"], facts["versions"]["flwr"] = "0" * 16, "1.39.0"
    facts["versions"]["torch"], facts["app"] = "2.0.0", "0" * 64
    (node / "fingerprint.json").write_text(json.dumps(facts))
    findings = {finding.what: finding for finding in check_node(node)}
    # The server shows a certificate of another CA than this node's.
    wrong = {name for name, finding in findings.items() if finding.state == "failed"}
    assert wrong == {"transfer set", "flwr", "key", "SuperLink", "app"}
    assert findings["torch"].state == "warning"
    assert "certificate refused" in findings["SuperLink"].found
    assert all(finding.mend for finding in findings.values() if finding.state != "ok")
    code, output = fedkd("deploy", "check", str(node))
    assert code == 1
    assert "chmod 600" in output


def test_check_says_that_nobody_listens(tmp_path: Path, tiny: Tiny) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    node = make(tmp_path / "dep", tiny(), "--port", str(port)) / "node-0"
    assert states(node)["SuperLink"] == "failed"


def test_check_says_that_a_node_has_no_images(tmp_path: Path, tiny: Tiny) -> None:
    node = make(tmp_path / "dep", tiny(), "--own-data") / "node-0"
    first = next(check_node(node))
    assert (first.what, first.state) == ("data", "failed")
    assert "set DATA in settings.env" in first.found


def test_check_refuses_a_folder_that_is_none(tmp_path: Path) -> None:
    code, output = fedkd("deploy", "check", str(tmp_path))
    assert code == 2
    assert "settings.env is missing" in output


# -- images of its own ---------------------------------------------------------------------


def run_nodes(experiment: Experiment, node_configs: list[dict[str, Any]], root: Path) -> str:
    """The student's hash after a run on in-process nodes with these node configs."""
    from fedkd.rounds import experiment_context

    grid = LocalGrid(make_client_app(), len(node_configs))
    for number, extra in enumerate(node_configs):
        grid._contexts[1000 - number].node_config.update(extra)
    run = RunDirectory.new(experiment)
    summary = run_job(grid, run, experiment_context(experiment, str(root)), simulated=False)
    assert summary["refused"] == []
    return str(summary["hash"])


def test_nodes_with_their_shards_alone_reach_the_student_of_the_simulation(
    tmp_path: Path, tiny: Tiny
) -> None:
    experiment = tiny("evaluation.baselines=[oracle]")
    folder = make(tmp_path / "dep", experiment, "--own-data", "--deal")
    expected = run_local(experiment).read_json("summary.json")["hash"]
    config = yaml.safe_load((folder / "superlink" / "experiment.yaml").read_text())
    deployed = tiny("evaluation.baselines=[oracle]", "data.public=public.npz")
    assert config["data"] == deployed.model_dump(mode="json")["data"]
    nodes = [
        {
            "data": str(folder / f"node-{number}" / "private.npz"),
            "data-root": str(folder / f"node-{number}"),
            "state-dir": str(tmp_path / f"state-{number}"),
            "policy": str(folder / f"node-{number}" / "policy.yaml"),
        }
        for number in range(3)
    ]
    assert run_nodes(deployed, nodes, folder / "superlink") == expected


def test_a_node_reads_the_data_set_once_per_run(tmp_path: Path, tiny: Tiny) -> None:
    experiment = tiny("evaluation.baselines=[]", "rounds=1")
    (tmp_path / "policy.yaml").write_text(policy_text(experiment, ExperimentContext(experiment)))
    nodes = [
        {"state-dir": str(tmp_path / f"state-{number}"), "policy": str(tmp_path / "policy.yaml")}
        for number in range(3)
    ]
    run_nodes(experiment, nodes, tmp_path)
    kept = sorted(p for p in (tmp_path / "state-2").rglob("*") if p.is_file())
    assert [p.name for p in kept] == [
        "judged.json", "private.npz", "public.npz", "teacher-0001.pt", "config.sha256",
    ]  # fmt: skip
    assert {p.stat().st_mode & 0o777 for p in kept} == {0o600}
    folders = [p for p in (tmp_path / "state-2").rglob("*") if p.is_dir()]
    assert {p.stat().st_mode & 0o777 for p in folders} == {0o700}


def test_the_two_files_are_the_split(tmp_path: Path, tiny: Tiny) -> None:
    experiment = tiny("data.transfer.labelled=true", "data.holdout=0.2", "data.validation=20")
    whole = build_data(experiment)
    write_public(whole, tmp_path / "public.npz", answers=True)
    write_private(whole, 1, tmp_path / "private.npz")
    part = build_data(
        experiment, own=LocalShard(1, tmp_path / "private.npz", tmp_path / "public.npz")
    )
    for mine, theirs in (
        (part.shard(1), whole.shard(1)),
        (part.holdout(1), whole.holdout(1)),
        (part.test, whole.test),
        (part.validation, whole.validation),
        (part.transfer.images, whole.transfer.images),
    ):
        assert mine.fingerprint() == theirs.fingerprint()
        assert mine.classes == theirs.classes
        assert (mine.labels == theirs.labels).all()
    assert (part.mean, part.std) == (whole.mean, whole.std)
    assert len(part.shard(0)) == len(part.shard(2)) == 0


def test_nodes_get_no_labels_that_are_the_servers(tmp_path: Path, tiny: Tiny) -> None:
    folder = make(tmp_path / "dep", tiny("data.validation=20"), "--own-data")
    with np.load(folder / "node-0" / "public.npz") as nodes:
        assert sorted(nodes.files) == ["classes", "x_test", "x_transfer", "x_validation"]
    with np.load(folder / "superlink" / "public.npz") as servers:
        assert {"y_test", "y_transfer", "y_validation"} < set(servers.files)


def test_pictures_in_class_folders_go_by_name(tmp_path: Path, tiny: Tiny) -> None:
    experiment = tiny("data.holdout=0")
    write_public(build_data(experiment), tmp_path / "public.npz", answers=False)
    for name, shade in (("pattern 3", 200), ("pattern 1", 100)):
        (tmp_path / "mine" / name).mkdir(parents=True)
        Image.new("L", (20, 20), shade).save(tmp_path / "mine" / name / "a.png")
    part = build_data(experiment, own=LocalShard(0, tmp_path / "mine", tmp_path / "public.npz"))
    shard = part.shard(0)
    assert (shard.labels.tolist(), shard.images[:, 0, 0, 0].tolist()) == ([1, 3], [100, 200])
    (tmp_path / "mine" / "pattern 1").rename(tmp_path / "mine" / "cat")
    with pytest.raises(ConfigError, match="unknown classes cat"):
        build_data(experiment, own=LocalShard(0, tmp_path / "mine", tmp_path / "public.npz"))


def test_private_images_have_to_fit_the_public_ones(tmp_path: Path, tiny: Tiny) -> None:
    write_public(build_data(tiny()), tmp_path / "public.npz", answers=False)
    np.savez(tmp_path / "mine.npz", x=np.zeros((2, 5, 5), np.uint8), y=np.array([0, 1]))
    with pytest.raises(ConfigError, match=re.escape("images are (1, 5, 5), the public ones")):
        build_data(tiny(), own=LocalShard(0, tmp_path / "mine.npz", tmp_path / "public.npz"))


def test_the_ceiling_is_refused_where_private_images_stay_away(tiny: Tiny) -> None:
    with pytest.raises(ConfigError, match="ceiling"):
        tiny("data.public=public.npz", "evaluation.baselines=[oracle, ceiling]")


@pytest.mark.parametrize("code", [5, 8])
def test_a_node_that_went_down_is_asked_once_more(tiny: Tiny, code: int) -> None:
    experiment = tiny("evaluation.baselines=[]", "rounds=1")
    asked: list[int] = []

    def falls(message: Message, context: Context, call_next: Any) -> Message:
        if message.metadata.message_type == "train" and context.node_config["partition-id"] == 1:
            asked.append(1)
            if len(asked) == 1:
                return Message(Error(code, "Node Unavailable"), reply_to=message)
        return call_next(message, context)

    run = run_local(experiment, client_app=make_client_app([falls]))
    assert len(asked) == 2
    assert run.events(ReplyRefused) == []
    assert run.events(RoundFinished)[0].answered == [0, 1, 2]


# -- status --------------------------------------------------------------------------------


def test_status_tells_a_finished_run_from_a_killed_one(tmp_path: Path, tiny: Tiny) -> None:
    run = run_local(tiny())
    done = status_of(run.path)
    assert (done.state, done.round, done.rounds) == ("finished", 2, 2)
    assert [health.last_round for health in done.clients.values()] == [2, 2, 2]
    assert set(done.clients[0].seconds) == {"train", "knowledge", "evaluate"}
    assert done.up == sum(entry.up for entry in run.messages())
    assert done.disk["checkpoints"] > 0
    # As it stands when the process is killed in round 2, in the middle of a line.
    run.path.joinpath("summary.json").unlink()
    lines = run.path.joinpath("metrics.jsonl").read_text().splitlines(keepends=True)
    first = next(n for n, line in enumerate(lines) if json.loads(line)["event"] == "round")
    run.path.joinpath("metrics.jsonl").write_text("".join(lines[: first + 1]) + '{"event": "cl')
    ledger = [line for line in run.messages() if line.round == 1]
    text = "".join(json.dumps(asdict(line)) + "\n" for line in ledger)
    run.path.joinpath("ledger.jsonl").write_text(text)
    killed = status_of(run.path)
    assert (killed.state, killed.round, killed.phase) == ("unfinished", 2, "waiting for clients")
    code, output = fedkd("status", str(run.path))
    assert code == 0
    assert "unfinished: round 2 of 2 (waiting for clients)" in output


def test_status_counts_refusals_by_client(tmp_path: Path, tiny: Tiny) -> None:
    run = RunDirectory.new(tiny())
    about = {"round": 1, "phase": "train", "down": 10}
    run.count(MessageCounted(**about, client=0, up=20, seconds=1.5, time=1000.0))
    run.count(MessageCounted(**about, client=1, up=0, seconds=9.0, time=1001.0))
    run.record(ReplyRefused(round=1, phase="train", client=1, reason="too late"))
    status = status_of(run.path)
    assert (status.phase, status.down, status.up) == ("train", 20, 20)
    assert (status.clients[0].seconds, status.clients[0].seen) == ({"train": 1.5}, 1000.0)
    assert status.clients[1].refusals == 1
    assert status.clients[1].reason == "round 1, train: too late"
    assert status.clients[1].seen is None
    code, output = fedkd("status", str(run.path), "--json")
    assert code == 0
    assert json.loads(output)["clients"]["1"]["refusals"] == 1


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("fingerprint.json", b"{", "fingerprint.json is damaged (not JSON"),
        ("fingerprint.json", b'{"transfer": "x"}', "class_map is missing"),
        ("settings.env", b"DATA=\xff\n", "settings.env: not a text file in UTF-8"),
    ],
)
def test_a_damaged_file_of_a_node_is_named(
    deployment: Path, tmp_path: Path, file: str, content: bytes, expected: str
) -> None:
    node = shutil.copytree(deployment / "node-0", tmp_path / "node-0")
    (node / file).write_bytes(content)
    with pytest.raises(ValueError) as refused:
        list(check_node(node))
    assert expected in str(refused.value)


@pytest.mark.parametrize("number", ["x", "-1", "3", "99999999999"])
def test_a_node_that_is_no_client_of_the_experiment_fails(
    deployment: Path, tmp_path: Path, number: str
) -> None:
    node = shutil.copytree(deployment / "node-0", tmp_path / "node-0")
    settings = (node / "settings.env").read_text()
    settings = settings.replace("PARTITION_ID=0", f"PARTITION_ID={number}")
    settings = re.sub("^SUPERLINK=.*$", "SUPERLINK=localhost:99999999", settings, flags=re.M)
    (node / "settings.env").write_text(settings)
    found = {finding.what: finding for finding in check_node(node)}
    assert f"PARTITION_ID: expected a client, 0 to 2, got '{number}'" in found["data"].found
    assert found["SuperLink"].state == "failed"
