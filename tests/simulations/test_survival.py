"""kill -9 at random moments: a student in the end, the very one, and nothing accepted is lost."""

import gc
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedkd.runs.directory import RunDirectory
from fedkd.runs.events import AnswersReleased
from fedkd.simulations.local import run_local
from tests.conftest import TINY, Tiny
from tests.simulations.test_weights_in_runs import saved

#: A part of clients that come and go, and codecs whose answers are changes of earlier ones.
DRAWN: dict[str, Any] = {
    "clients": "2 to 6",
    "rounds": 6,
    "federation": {
        "codec": "delta",
        "participation": {
            "ask": 0.5,
            "minimum": 2,
            "sampler": {"name": "trace", "there": {1: "1-2", 2: "1, 4-", 3: "2-", 4: "3, 5"}},
        },
    },
}

#: Adapters beside the weights of a file, sent back to the clients.
ADAPTER = {"name": "cnn_tiny", "weights": "net.pt", "peft": {"method": "lora", "r": 2}}
ADAPTED: dict[str, Any] = {
    "teachers": {**TINY["teachers"], "models": [ADAPTER], "feedback": {"use": "init"}},
    "student": {"model": ADAPTER},
}

#: Votes about cells; with so much to spend that their noise changes no label.
VOTES: dict[str, Any] = {
    "release": {"name": "gnmax", "epsilon": 1e4, "min_votes": 3, "cells": 6},
    "fusion": ["uniform"],
    "distillation": {"losses": ["ce"], "epochs": 2},
    "evaluation": {"teachers": False, "clients": False, "baselines": ["oracle"]},
}


def start(*words: str, folder: Path) -> subprocess.Popen[bytes]:
    """The `fedkd` command in a process group of its own, all on one thread."""
    code = "from fedkd.simulations.cli.main import main; main()"
    log = (folder / "log.txt").open("ab")
    return subprocess.Popen(
        [sys.executable, "-c", code, *words],
        stdout=log, stderr=log, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def kept(run: Path) -> set[str]:
    """Knowledge that the server has accepted and still holds."""
    return {str(p.relative_to(run)) for p in run.glob("knowledge/round-*/*/client-*/logits.npy")}


def runs_in(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.glob("runs/*/config.yaml"))


@pytest.mark.slow
@pytest.mark.parametrize("runner", ["local", "ray"])
def test_what_was_released_before_a_kill_is_not_drawn_again(tmp_path: Path, runner: str) -> None:
    """Noisy labels: another draw would be another release about the same images."""
    config = tmp_path / "tiny.yaml"
    release = {**VOTES["release"], "epsilon": 2.0}
    values = {**TINY, **VOTES, "release": release, "rounds": 1, "output": str(tmp_path / "runs")}
    values["distillation"] = {"losses": ["ce"], "epochs": 400}  # time to be killed in
    config.write_text(yaml.safe_dump(values), encoding="utf-8")
    process = start("run", str(config), "--runner", runner, folder=tmp_path)
    while process.poll() is None and not (found := [*tmp_path.rglob("released.pt")]):
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    (place,) = found
    before, (run,) = place.read_bytes(), runs_in(tmp_path)
    assert not (run / "summary.json").is_file()
    assert start("run", "--resume", str(run), "--runner", runner, folder=tmp_path).wait() == 0
    assert place.read_bytes() == before
    events = RunDirectory.open(run).events(AnswersReleased)
    assert len({event.mu for event in events}) == 1
    spent = RunDirectory.open(run).read_json("privacy.json")["worst"]
    assert spent == pytest.approx(2.0, rel=1e-6)  # paid for once


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("runner", "more", "wanted"),
    [
        ("local", {}, 20),
        ("ray", {}, 20),
        ("local", DRAWN, 10),
        ("local", ADAPTED, 4),
        ("local", VOTES, 4),
    ],
    ids=["local", "ray", "drawn", "adapted", "votes"],
)
def test_kills_at_random_moments_change_nothing(
    tmp_path: Path,
    tiny: Tiny,
    monkeypatch: pytest.MonkeyPatch,
    runner: str,
    more: dict[str, Any],
    wanted: int,
) -> None:
    """With Ray the whole tree is killed: server, raylet and the clients' actors."""
    monkeypatch.setenv("FEDKD_DATA", str(tmp_path))
    saved(tiny(), "cnn_tiny", tmp_path / "net.pt")
    config = tmp_path / "tiny.yaml"
    values = {**TINY, "rounds": 4, "output": str(tmp_path / "runs"), **more}
    config.write_text(yaml.safe_dump(values), encoding="utf-8")
    began = time.monotonic()
    assert start("run", str(config), "--runner", runner, folder=tmp_path).wait() == 0
    whole = time.monotonic() - began
    [reference] = runs_in(tmp_path)
    expected = RunDirectory.open(reference).read_json("summary.json")["hash"]

    draw = random.Random(0)
    kills, finished = 0, 0
    current: Path | None = None
    for _ in range(10 * wanted):
        words = ["--resume", str(current)] if current else [str(config)]
        process = start("run", *words, "--runner", runner, folder=tmp_path)
        before = kept(current) if current else set()
        moment = time.monotonic() + draw.uniform(0, 1.1 * whole)
        while process.poll() is None and time.monotonic() < moment:
            time.sleep(0.02)
        ended = process.poll()
        if ended is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
        fresh = [run for run in runs_in(tmp_path) if run != reference]
        current = fresh[-1] if fresh else None
        if current is not None and not (current / "summary.json").is_file():
            assert before <= kept(current), "accepted knowledge was lost"
        if ended is not None:
            assert ended == 0, (tmp_path / "log.txt").read_text(encoding="utf-8")[-2000:]
            assert current is not None
            assert RunDirectory.open(current).read_json("summary.json")["hash"] == expected
            finished += 1
            current.rename(tmp_path / f"done-{finished}")
            current = None
            if kills >= wanted:
                break
    assert kills >= wanted
    assert finished >= 1


def test_files_of_a_rounds_knowledge_are_closed_with_the_round(tiny: Tiny) -> None:
    """Without the garbage collector's help, which comes ever later in a long run: a round maps a
    file for each client and kind, and a process may have about a thousand open."""
    mapped: list[int] = []

    def count(event: str, **_: Any) -> None:
        if event == "round":
            links = [p.readlink() for p in Path("/proc/self/fd").iterdir() if p.is_symlink()]
            mapped.append(sum("/knowledge/round-" in str(link) for link in links))

    gc.collect()
    gc.disable()
    try:
        run_local(tiny("rounds=4", "evaluation.baselines=[]"), notify=count)
    finally:
        gc.enable()
    assert mapped[-1] <= mapped[0]
