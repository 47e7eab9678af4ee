"""The benchmark for GPUs goes through on a CPU, on a machine that has torch and little else."""

import json
import subprocess
import sys

import pytest

from tests.benchmarks.bare import ROOT, bare


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    done = bare("gpu.py", "--minutes", "30", "--log", "gpu.log", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr + (folder / "gpu.log").read_text()
    found = json.loads((folder / "gpu.json").read_text())
    assert all(str(row["what"]) in done.stdout for row in found)
    return found


def test_all_parts_go_through_without_the_requirements(rows):
    assert {row["part"] for row in rows} > {"right", "central", "clients", "losses", "feddf"}
    assert [row for row in rows if row["verdict"] in ("BAD", "FAILED")] == []


def test_graph_and_plain_steps_are_compared(rows):
    checks = [row for row in rows if row["what"].startswith("graph = eager")]
    assert len(checks) == 2
    assert all(row["verdict"] == "ok" for row in checks)


def test_a_part_that_fails_leaves_its_traceback_and_does_not_stop_the_others(tmp_path):
    sabotage = "import fedkd.data.views as v; v.AUGMENTATIONS['crop_flip'] = None\n"
    script = tmp_path / "sabotaged.py"
    script.write_text(
        sabotage
        + f"import runpy, sys; sys.path.insert(0, {str(ROOT / 'benchmarks')!r})\n"
        + f"runpy.run_path({str(ROOT / 'benchmarks' / 'gpu.py')!r}, run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, str(script), "--parts", "views,fusion", "--log", "gpu.log"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=290,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
    )
    assert done.returncode == 1
    assert "FAILED" in done.stdout
    assert "fusion    uniform" in done.stdout
    assert "TypeError" in (tmp_path / "gpu.log").read_text()
