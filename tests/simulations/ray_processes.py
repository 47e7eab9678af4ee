"""What tests of Ray share."""

import contextlib
import os
import time
from collections.abc import Iterator

import psutil
import pytest

from fedkd.runs.directory import RunDirectory


def student(run: RunDirectory) -> str:
    return str(run.read_json("summary.json")["hash"])


def ray_processes() -> set[int]:
    """Those of this test process, and orphans; not those of tests in other processes."""
    beside = {child.pid for child in psutil.Process(os.getppid()).children()} - {os.getpid()}
    words = ("raylet", "gcs_server", "ray::", "default_worker.py", "log_monitor", "dashboard/agent")
    found = set()
    for process in psutil.process_iter(["pid", "cmdline"]):
        line = " ".join(process.info["cmdline"] or [])
        if any(word in line for word in words):
            with contextlib.suppress(psutil.NoSuchProcess):
                if beside.isdisjoint(parent.pid for parent in process.parents()):
                    found.add(process.info["pid"])
    return found


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    before = ray_processes()
    yield
    deadline = time.monotonic() + 60  # Ray's agents notice a killed server late
    while (left := ray_processes() - before) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert not left, [psutil.Process(pid).cmdline() for pid in left]
