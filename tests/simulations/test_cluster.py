"""The scripts of docs/cluster.md."""

import os
import re
import subprocess
import time
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "cluster.md").read_text(encoding="utf-8")
SCRIPTS = re.findall(r"^```bash\n(#!/bin/bash\n.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("script", SCRIPTS, ids=range(len(SCRIPTS)))
def test_scripts_are_bash(script: str) -> None:
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert "#SBATCH" in script


def stand_in(folder: Path, name: str, code: str) -> None:
    file = folder / "bin" / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(f"#!/bin/bash\n{code}\n")
    file.chmod(0o755)


@pytest.mark.parametrize(("code", "requeued"), [(75, True), (0, False), (1, False)])
def test_a_job_that_is_stopped_is_requeued_and_goes_on(
    tmp_path: Path, code: int, requeued: bool
) -> None:
    script = tmp_path / "job.sh"
    script.write_text(SCRIPTS[0])
    # The first time it begins a run and waits to be stopped; then it ends with `code`.
    begins = (
        'echo "$@" >> words; mkdir -p runs/4711/run; touch begun; '
        f"trap 'exit {code}' TERM; while :; do sleep 0.05; done"
    )
    stand_in(tmp_path, "fedkd", begins)
    stand_in(tmp_path, "scontrol", 'echo "$@" >> requeued')
    env = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "4711"}
    for _ in range(2):
        job = subprocess.Popen(["bash", str(script)], cwd=tmp_path, env=env)
        deadline = time.monotonic() + 60
        while not (tmp_path / "begun").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        job.terminate()
        assert job.wait(60) == code
        (tmp_path / "begun").unlink()
    first, second = (tmp_path / "words").read_text().splitlines()
    assert first == f"run configs/fashion_mnist.yaml output={tmp_path}/runs/4711"
    assert second == f"run --resume {tmp_path}/runs/4711/run/"
    there = (tmp_path / "requeued").read_text() if (tmp_path / "requeued").exists() else ""
    assert there == ("requeue 4711\n" * 2 if requeued else "")
