"""A federation of real processes on this machine: TLS, registered keys, own images."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedkd.config import Experiment
from fedkd.rounds import Workspace
from fedkd.rundir import RunDirectory
from simulations.commands.status import status_of
from simulations.deploy.folder import deployable, write_folder
from simulations.deploy.keys import node_pair
from simulations.deploy.plan import Plan
from simulations.local import run_local

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

    def run(script: Path, log: str, *words: str) -> subprocess.Popen[bytes]:
        with (tmp_path / log).open("wb") as file:
            process = subprocess.Popen(
                [str(script), *words], env=env, stdout=file, stderr=file, start_new_session=True
            )
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


def test_a_federation_of_processes_gives_the_student_of_the_simulation(
    tmp_path: Path, tiny: Callable[..., Experiment], start: Start
) -> None:
    experiment = tiny("rounds=1", *DIGITS)
    plan = Plan(3, ("localhost", "127.0.0.1"), free_port(), own_data=True, deal=True)
    deployed = tiny("rounds=1", *DIGITS, *deployable(experiment, plan))
    folder = tmp_path / "federation"
    write_folder(folder, plan, deployed, Workspace(experiment))
    link = folder / "superlink"
    for number in range(3):
        settings = folder / f"node-{number}" / "settings.env"
        text = settings.read_text().replace(f"={9100 + number}\n", f"={free_port()}\n")
        settings.write_text(text)
    start(link / "superlink.sh", "superlink.log")

    def up() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", plan.port)) == 0

    wait("the SuperLink", up)
    assert start(link / "register.sh", "register.log").wait() == 0

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
    said = (tmp_path / "run.log").read_text()
    assert run.returncode == 0, said
    (path,) = (link / "runs").iterdir()
    summary = RunDirectory.open(path).read_json("summary.json")
    assert summary["refused"] == []
    assert summary["hash"] == run_local(experiment).read_json("summary.json")["hash"]
    assert status_of(path).state == "finished"
    # Each node kept what is its own, and the server holds no private image.
    assert sorted(p.name for p in (folder / "node-1" / "state" / path.name).iterdir()) == [
        "client-0001"
    ]
    assert not list(link.rglob("private.npz"))
