"""`flwr run .`: the same job through Flower's own command line, SuperLink and app bundle."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from fedkd.runs.directory import RunDirectory
from fedkd.runs.events import ClientTrained, RoundFinished
from fedkd.simulations.local import run_local
from fedkd.simulations.ray import OFFLINE
from tests.conftest import Tiny

ROOT = Path(__file__).parents[2]
FLWR = Path(sys.executable).with_name("flwr")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def flower(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Run `flwr` words in a copy of the app, with a SuperLink of its own; stop it afterwards."""
    # `flwr run` starts its SuperLink in the working directory, whose code would shadow the
    # bundle's in Ray's workers: a copy makes sure that the bundle itself is what runs.
    app = tmp_path / "app"
    app.mkdir()
    for name in ("fedkd", "strategies", "simulations", "configs"):
        shutil.copytree(
            ROOT / name, app / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, app / name)
    home = tmp_path / "flwr"
    home.mkdir()
    env = {
        **os.environ,
        **OFFLINE,
        "FLWR_HOME": str(home),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(free_port()),
        "FLWR_LOCAL_CONTROL_API_PORT": str(free_port()),
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
        "PATH": f"{FLWR.parent}{os.pathsep}{os.environ['PATH']}",
    }

    def run(*words: str) -> str:
        done = subprocess.run(
            [str(FLWR), *words], cwd=app, env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    yield run
    for process in psutil.process_iter(["cmdline", "environ"]):
        if (process.info["environ"] or {}).get("FLWR_HOME") == str(home):
            process.kill()


def wait_for(flower: Callable[..., str], run_id: str) -> str:
    """Status of a run once it has finished. (`--stream` exits with 0 even if the run failed.)"""
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        runs = json.loads(flower("ls", "--format", "json"))["runs"]
        status = next(r["status"] for r in runs if str(r["run-id"]) == run_id)
        if status.startswith("finished"):
            return str(status)
        time.sleep(1)
    pytest.fail("the run did not finish")


def submit(flower: Callable[..., str], nodes: int, run_config: str, app: str = ".") -> str:
    out = flower(
        "run", app, "--format", "json",
        "--federation-config", f"num-supernodes={nodes} client-resources-num-cpus=1",
        "--run-config", run_config,
    )  # fmt: skip
    return str(json.loads(out[out.index("{") :])["run-id"])


def test_flwr_run_gives_the_same_student_and_refuses_another_federation(
    flower: Callable[..., str], tiny: Tiny, tmp_path: Path
) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text(tiny("evaluation.baselines=[]").to_yaml())
    output = tmp_path / "flower-runs"
    settings = f"config='{config}' overrides='rounds=1 seed=3' output='{output}'"

    right = submit(flower, 3, settings)
    wrong = submit(flower, 2, settings.replace("flower-runs", "other-runs"))
    assert wait_for(flower, right) == "finished:completed", flower("log", right, "--show")
    (path,) = output.iterdir()
    ours = run_local(tiny("rounds=1", "seed=3", "evaluation.baselines=[]"))
    theirs = RunDirectory.open(path)
    assert theirs.read_json("summary.json")["hash"] == ours.read_json("summary.json")["hash"]

    assert wait_for(flower, wrong) == "finished:failed"
    assert "the experiment has 3 clients, the federation has 2 nodes" in flower(
        "log", wrong, "--show"
    )


@pytest.mark.slow
def test_clients_that_train_together_do_so_under_flwr_run(
    flower: Callable[..., str], tiny: Tiny, tmp_path: Path
) -> None:
    words = ("clients=6", "resources.batch_clients=on", "teachers.optimizer={name: sgd}")
    config = tmp_path / "tiny.yaml"
    config.write_text(tiny(*words, "rounds=1").to_yaml())
    run_id = submit(flower, 6, f"config='{config}' output='{tmp_path / 'there'}'")
    assert wait_for(flower, run_id) == "finished:completed"
    (path,) = (tmp_path / "there").iterdir()
    run = RunDirectory.open(path)
    assert run.events(RoundFinished)[0].answered == [*range(6)]
    # Members of a group share its seconds; nobody else ends in the same millisecond.
    seconds = [event.seconds for event in run.events(ClientTrained)]
    assert len(set(seconds)) < len(seconds)


@pytest.mark.slow
def test_the_app_that_fedkd_init_makes_runs(
    flower: Callable[..., str], tiny: Tiny, tmp_path: Path
) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text(tiny("rounds=1", "seed=3").to_yaml())
    app = tmp_path / "my-app"
    words = [sys.executable, "-m", "fedkd", "init", str(app), "--flower", "--config", str(config)]
    subprocess.run(words, check=True, capture_output=True)
    settings = f"overrides='output={tmp_path / 'there'}'"
    run_id = submit(flower, 3, settings, str(app))
    assert wait_for(flower, run_id) == "finished:completed", flower("log", run_id, "--show")
    (path,) = (tmp_path / "there").iterdir()
    ours = run_local(tiny("rounds=1", "seed=3"))
    theirs = RunDirectory.open(path)
    assert theirs.read_json("summary.json")["hash"] == ours.read_json("summary.json")["hash"]
