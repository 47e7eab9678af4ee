"""`fedkd run` on Ray, in a process of its own."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedkd.runs.directory import RunDirectory
from fedkd.simulations.local import run_local
from tests.conftest import Tiny
from tests.simulations.ray_processes import nothing_left_behind, student  # noqa: F401

ROOT = Path(__file__).parents[2]


def test_modules_beside_the_run_hide_none_of_ours_and_a_long_tmpdir_does_no_harm(
    tiny: Tiny, tmp_path: Path
) -> None:
    """In the server's process and in the workers: the working directory is searched last."""
    scratch = tmp_path / ("a-long-scratch-folder-" * 5)
    scratch.mkdir()
    names = ("datasets", "random", "typing", "torch", "ray", "flwr", "numpy", "yaml", "click")
    for name in names:
        (tmp_path / f"{name}.py").write_text("raise SystemError('the wrong module')")
    for name in ("fedkd", "simulations", "strategies", "configs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemError('the wrong package')")
    (tmp_path / "mine.py").write_text(
        "from fedkd.fusion import FUSIONS\n"
        "from fedkd.fusion.base import Fusion\n"
        "@FUSIONS.register('mine')\n"
        "class Mine(Fusion):\n"
        "    def __call__(self, ensemble):\n        return ensemble\n"
    )
    config = tiny("rounds=1", "clients=2", "evaluation.baselines=[]", "distillation.losses=[kd]")
    text = config.to_yaml().replace("plugins: []", "plugins: [mine]")
    (tmp_path / "tiny.yaml").write_text(text.replace("name: class_gated", "name: mine"))
    done = subprocess.run(
        [sys.executable, "-c",
         "import sys; sys.path.pop(0); from fedkd.simulations.cli.main import main; main()",
         "run", "tiny.yaml"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "TMPDIR": str(scratch), "RAY_ADDRESS": "10.1.2.3:6379"},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    (run,) = (tmp_path / "runs").iterdir()
    assert '"refused"' not in (run / "metrics.jsonl").read_text()
    assert "Ray uses /tmp/" in (run / "run.log").read_text()


@pytest.mark.slow
def test_a_killed_server_leaves_no_process_and_can_be_resumed(tiny: Tiny, tmp_path: Path) -> None:
    whole = run_local(tiny("rounds=3"))
    config = tmp_path / "tiny.yaml"
    config.write_text(tiny("rounds=3").to_yaml())
    process = subprocess.Popen(
        [sys.executable, "-m", "fedkd", "run", str(config)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    runs = tmp_path / "runs"
    deadline = time.monotonic() + 90
    known = {whole.path}
    while time.monotonic() < deadline:
        fresh = [p for p in runs.glob("*") if p not in known and list(p.glob("checkpoints/*.pt"))]
        if fresh:
            break
        time.sleep(0.02)
    process.kill()
    process.wait()
    (path,) = [p for p in runs.glob("*") if p not in known]
    resumed = subprocess.run(
        [sys.executable, "-m", "fedkd", "run", "--resume", str(path)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert resumed.returncode == 0, resumed.stderr
    assert student(RunDirectory.open(path)) == student(whole)
