"""A federation of real processes on this machine: TLS, registered keys, own images, attackers."""

import contextlib
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from flwr.app import Context, Message

from fedkd.config import Experiment
from fedkd.rounds import ExperimentContext
from fedkd.runs.directory import RunDirectory
from fedkd.runs.events import RoundFinished, SumAsked
from fedkd.simulations.cli.status import status_of
from fedkd.simulations.client_app import make_client_app
from fedkd.simulations.deploy.folder import deployable, read_settings, write_folder
from fedkd.simulations.deploy.keys import node_pair
from fedkd.simulations.deploy.plan import Plan
from fedkd.simulations.local import run_local
from tests.conftest import Tiny
from tests.simulations import evil_app
from tests.simulations.evil_app import DROPPER, LIAR, THIEF, write_app

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

Start = Callable[..., "subprocess.Popen[bytes]"]
BIN = Path(sys.executable).parent
DIGITS = (
    "data.dataset=digits", "data.transfer.size=60", "data.test=60",
    "evaluation.baselines=[oracle]",
)  # fmt: skip


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait(what: str, holds: Callable[[], bool], seconds: float = 150) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            pytest.fail(f"{what}: not within {seconds} s")
        time.sleep(0.5)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start a script with its own process group and log; everything is ended afterwards."""
    running: list[subprocess.Popen[bytes]] = []
    env = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}

    def run(
        script: Path, log: str, *words: str, cwd: Path | None = None, **more: str
    ) -> subprocess.Popen[bytes]:
        with (tmp_path / log).open("wb") as file:
            process = subprocess.Popen(
                [str(script), *words], env={**env, **more}, stdout=file, stderr=file,
                start_new_session=True, cwd=cwd,
            )  # fmt: skip
        running.append(process)
        return process

    yield run
    for process in running:
        kill(process)


def kill(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to a process and all its children."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@dataclass(frozen=True)
class Federation:
    """A deployment whose SuperLink runs and knows its nodes' keys."""

    folder: Path
    plan: Plan

    @property
    def link(self) -> Path:
        return self.folder / "superlink"

    def result(self) -> tuple[Path, dict[str, Any]]:
        (path,) = (self.link / "runs").iterdir()
        return path, RunDirectory.open(path).read_json("summary.json")


def up(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def deploy(
    experiment: Experiment, deployed: Experiment, folder: Path, plan: Plan, start: Start
) -> Federation:
    """What the guide says, up to `register.sh`."""
    write_folder(folder, plan, deployed, ExperimentContext(experiment))
    link = folder / "superlink"
    replace(link, f"CONTROL_PORT={plan.control_port}\n", f"CONTROL_PORT={free_port()}\n")
    for number in range(plan.nodes):
        node = folder / f"node-{number}"
        replace(node, f"={9100 + number}\n", f"={free_port()}\n")
    start(link / "superlink.sh", "superlink.log")
    wait("the gate", lambda: up(plan.port))
    wait("the SuperLink", lambda: up(int(read_settings(link / "settings.env")["CONTROL_PORT"])))
    assert start(link / "register.sh", "register.log").wait() == 0
    return Federation(folder, plan)


def replace(folder: Path, old: str, new: str) -> None:
    path = folder / "settings.env"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def made(tiny: Tiny, nodes: int, *words: str) -> tuple[Experiment, Experiment, Plan]:
    """An experiment, how it is deployed, and the plan."""
    base = ("rounds=1", f"clients={nodes}", *DIGITS, *words)
    plan = Plan(nodes, ("localhost", "127.0.0.1"), free_port(), own_data=True, deal=True)
    return tiny(*base), tiny(*base, *deployable(tiny(*base), plan)), plan


def test_a_federation_of_processes_gives_the_student_of_the_simulation(
    tmp_path: Path, tiny: Tiny, start: Start
) -> None:
    experiment, deployed, plan = made(tiny, 3)
    federation = deploy(experiment, deployed, tmp_path / "federation", plan, start)
    folder, link = federation.folder, federation.link

    # A node with everything but a registered key.
    stranger = folder / "stranger"
    shutil.copytree(folder / "node-0", stranger)
    (stranger / "node.key").write_bytes(node_pair("stranger").private)
    log = tmp_path / "stranger.log"
    process = start(stranger / "supernode.sh", log.name)
    wait("the refusal", lambda: "Failed to activate SuperNode" in log.read_text())
    kill(process)

    for number in range(3):
        start(folder / f"node-{number}" / "supernode.sh", f"node-{number}.log")
    run = start(link / "run.sh", "run.log")
    wait("the run", lambda: run.poll() is not None, 600)
    log = (tmp_path / "run.log").read_text()
    assert run.returncode == 0, log
    path, summary = federation.result()
    assert summary["refused"] == []
    assert summary["hash"] == run_local(experiment).read_json("summary.json")["hash"]
    assert status_of(path).state == "finished"
    # Each node kept what is its own, and the server holds no private image.
    kept = folder / "node-1" / "state" / path.name
    assert sorted(p.name for p in kept.iterdir()) == ["client-0001", "config.sha256"]
    assert not list(link.rglob("private.npz"))


@pytest.mark.timeout(1800)
def test_nodes_join_leave_for_good_and_return(tmp_path: Path, tiny: Tiny, start: Start) -> None:
    """The run starts with three of at most five nodes, and the report shows who was there when."""
    words = ("clients=2 to 5", "rounds=7", "teachers.models=[mlp, mlp, mlp, cnn_tiny]")
    experiment, _, plan = made(tiny, 5, *words)
    # A node that is killed is given up once its heartbeat is missed, and not waited for.
    deployed = tiny(*DIGITS, *words, *deployable(experiment, plan), "federation.wait=1")
    federation = deploy(experiment, deployed, tmp_path / "federation", plan, start)

    def node(number: int) -> "subprocess.Popen[bytes]":
        return start(federation.folder / f"node-{number}" / "supernode.sh", f"node-{number}.log")

    def rounds() -> list[RoundFinished]:
        runs = federation.link / "runs"
        found = [p.parent for p in runs.glob("*/metrics.jsonl")] if runs.is_dir() else []
        return RunDirectory.open(found[0]).events(RoundFinished) if found else []

    def answers(*clients: int) -> Callable[[], bool]:
        return lambda: bool(rounds()) and rounds()[-1].answered == [*clients]

    nodes = [node(number) for number in range(3)]
    run = start(federation.link / "run.sh", "run.log")
    wait("round 1", answers(0, 1, 2), 300)
    node(3)
    wait("the fourth node", answers(0, 1, 2, 3), 300)
    kill(nodes[1])
    kill(nodes[2])
    wait("a round without them", answers(0, 3), 300)
    node(2)
    wait("the third node's return", answers(0, 2, 3), 300)
    wait("the run", lambda: run.poll() is not None, 600)
    assert run.returncode == 0, (tmp_path / "run.log").read_text()
    path, summary = federation.result()
    there = {
        client: ", ".join(str(e.round) for e in rounds() if client in e.answered)
        for client in range(5)
    }
    trace = f"federation.participation.sampler={{name: trace, there: {there}}}"
    simulated = run_local(tiny(*DIGITS, *words, trace))
    assert [e.answered for e in simulated.events(RoundFinished)] == [e.answered for e in rounds()]
    assert summary["hash"] == simulated.read_json("summary.json")["hash"]
    assert "Who was there" in (path / "report.html").read_text(encoding="utf-8")


def test_whoever_has_the_ca_file_starts_no_run_and_registers_no_key(
    tmp_path: Path, tiny: Tiny, start: Start
) -> None:
    experiment, deployed, plan = made(tiny, 2)
    federation = deploy(experiment, deployed, tmp_path / "federation", plan, start)
    node = start(federation.folder / "node-0" / "supernode.sh", "node-0.log")
    log = tmp_path / "node-0.log"
    wait("the node", lambda: "SuperNode ID" in log.read_text())

    # All that a node, or whoever robs one, has: where the server is, and ca.crt.
    home = tmp_path / "attacker"
    home.mkdir()
    ca = shutil.copy(federation.folder / "node-1" / "ca.crt", home)
    address = f"localhost:{plan.port}"
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "remote"\n[superlink.remote]\naddress = "{address}"\n'
        f'root-certificates = "{ca}"\n'
    )
    pair = node_pair("evil")
    (home / "evil.pub").write_bytes(pair.public)
    loot = tmp_path / "loot"
    loot.mkdir()
    app = write_app(tmp_path / "evilapp", THIEF.format(loot=str(loot)))
    for number, words in enumerate(
        (
            ("run", str(app), "remote"),
            ("supernode", "register", str(home / "evil.pub"), "remote"),
            ("supernode", "list", "remote"),
            ("ls", "remote"),
        )
    ):
        attack = start(
            BIN / "flwr", f"attack-{number}.log", *words, FLWR_HOME=str(home),
            FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION="1", FLWR_TELEMETRY_ENABLED="0",
        )  # fmt: skip
        assert attack.wait(120) != 0, words
        assert "404" in (tmp_path / f"attack-{number}.log").read_text()
    trusted = ssl.create_default_context(cafile=ca)
    with httpx.Client(base_url=f"https://{address}", verify=trusted) as attacker:
        for path in ("control/start-run", "control/register-node", "runtime/acquire-task"):
            assert attacker.post(f"/v1/{path}").status_code == 404
        assert attacker.post("/v1/fleet/register-node").status_code == 404
        # The way that is open asks who is there.
        assert attacker.post("/v1/fleet/get-run").status_code in (400, 401, 415)
    evil = federation.folder / "evil"
    shutil.copytree(federation.folder / "node-1", evil)
    (evil / "node.key").write_bytes(pair.private)
    evil_log = tmp_path / "evil.log"
    process = start(evil / "supernode.sh", evil_log.name)
    wait("the refusal", lambda: "Failed to activate SuperNode" in evil_log.read_text())
    kill(process)
    assert "ID" not in (tmp_path / "attack-2.log").read_text()
    assert list(loot.iterdir()) == []

    # Whoever sits on the server starts it there; the node unpacks nothing of it.
    own = start(federation.link / "flwr.sh", "own.log", "run", str(app), "remote")
    assert own.wait(120) == 0, (tmp_path / "own.log").read_text()
    replies = loot / "replies"
    wait("the node's answer", lambda: replies.is_file() and "none of APPS" in replies.read_text())
    assert "ANSWERED" not in replies.read_text()
    assert sorted(p.name for p in loot.iterdir()) == ["replies", "server"]
    assert not (federation.folder / "node-0" / "state" / "node" / "apps").exists()
    assert node.poll() is None


def test_a_registered_node_takes_nobodys_place_and_spoils_nothing(
    tmp_path: Path, tiny: Tiny, start: Start
) -> None:
    experiment, deployed, plan = made(tiny, 4, "federation.quorum=0.5")
    federation = deploy(experiment, deployed, tmp_path / "federation", plan, start)
    app = write_app(tmp_path / "evilapp", LIAR)
    # Node 2 says that it is client 0; node 3 sends garbage.
    for number, lies in ((2, {"VICTIM": "0"}), (3, {"TRAINS": "1"})):
        node = federation.folder / f"node-{number}"
        start(
            Path(sys.executable), f"node-{number}.log", str(evil_app.__file__), str(app), cwd=node,
            FLWR_HOME=str(node / "state" / "node"), FLWR_TELEMETRY_ENABLED="0",
            FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION="1",
            **read_settings(node / "settings.env"), **lies,
        )  # fmt: skip
    for number in (0, 1):
        start(federation.folder / f"node-{number}" / "supernode.sh", f"node-{number}.log")
    run = start(federation.link / "run.sh", "run.log")
    wait("the run", lambda: run.poll() is not None, 600)
    assert run.returncode == 0, (tmp_path / "run.log").read_text()
    _, summary = federation.result()
    reasons = [(row["phase"], row["client"], row["reason"]) for row in summary["refused"]]
    refusals = " ".join(reason for _, client, reason in reasons if client == 0)
    assert "claims to be client 0 without the key of node-0.pub" in refusals
    assert {client for _, client, _ in reasons} == {0, 3}
    assert {phase for phase, client, _ in reasons if client == 0} == {"describe"}

    def absent(message: Message, context: Context, call: Any) -> Message:
        number = context.node_config["partition-id"]
        kind = message.metadata.message_type
        if number == 2 or (number == 3 and kind != "query.describe" and kind != "train"):
            raise RuntimeError("away")
        return call(message, context)

    alone = run_local(experiment, client_app=make_client_app(mods=[absent]))
    assert summary["hash"] == alone.read_json("summary.json")["hash"]


def test_four_nodes_sum_their_votes_and_one_drops_out_after_its_key(
    tmp_path: Path, tiny: Tiny, start: Start
) -> None:
    words = (
        "release={name: gnmax, epsilon: 500.0, min_votes: 3, cells: 10, "
        "secure: {missing: 1, colluding: 0, repeats: 1}}",
        "distillation={losses: [ce], epochs: 2}", "fusion=[uniform]", "evaluation.teachers=false",
        "evaluation.clients=false", "teachers={models: [mlp], epochs: 2}",
    )  # fmt: skip
    experiment, deployed, plan = made(tiny, 4, *words)
    federation = deploy(experiment, deployed, tmp_path / "federation", plan, start)
    app = write_app(tmp_path / "dropper", DROPPER)
    node = federation.folder / "node-3"
    start(
        Path(sys.executable), "node-3.log", str(evil_app.__file__), str(app), cwd=node,
        FLWR_HOME=str(node / "state" / "node"), FLWR_TELEMETRY_ENABLED="0",
        FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION="1", **read_settings(node / "settings.env"),
    )  # fmt: skip
    for number in range(3):
        start(federation.folder / f"node-{number}" / "supernode.sh", f"node-{number}.log")
    run = start(federation.link / "run.sh", "run.log")
    wait("the run", lambda: run.poll() is not None, 600)
    assert run.returncode == 0, (tmp_path / "run.log").read_text()
    path, summary = federation.result()
    sums = RunDirectory.open(path).events(SumAsked)
    assert [each.clients for each in sums] == [[0, 1, 2, 3], [0, 1, 2]]
    assert [(row["phase"], row["client"]) for row in summary["refused"]] == [("masked", 3)]
    assert summary["degraded_rounds"] == []
    assert summary["privacy"]["worst"] == pytest.approx(500.0, rel=0.02)
    # Every node that voted booked both sums, in its own ledgers; the server has no single votes.
    for number in range(3):
        state = federation.folder / f"node-{number}" / "state"
        books = [*state.glob("*/client-*/privacy.jsonl"), *state.glob("budgets/*.jsonl")]
        assert [book.read_text().count('"reserve"') for book in books] == [2, 2]
    assert not list((path / "knowledge").rglob("client-*"))
