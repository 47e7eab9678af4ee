"""A federation small enough to run in a second."""

import os
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from fedkd.config import Experiment, make_experiment
from fedkd.runs.directory import RunDirectory

Tiny = Callable[..., Experiment]
Shared = Callable[..., RunDirectory]

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The longest files. They begin first, so that no worker is left alone with one at the end.
LONGEST = (
    "test_ray.py",
    "test_flwr_run.py",
    "test_ray_command.py",
    "test_cli.py",
    "test_deploy.py",
)


def pytest_configure(config: pytest.Config) -> None:
    """Keep pytest-xdist from sorting files by their number of tests."""
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, the others in their order."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


# Networks this small only wait for each other on more threads.
torch.set_num_threads(1)


@pytest.fixture
def data_root() -> Path:
    """Folder of real image data, or skip."""
    candidates = [os.environ.get("FEDKD_DATA"), Path(__file__).parents[2] / "shared" / "data"]
    for candidate in candidates:
        if candidate and Path(candidate).is_dir():
            return Path(candidate)
    pytest.skip("no real images: set FEDKD_DATA to a folder that holds FashionMNIST/raw")


TINY: dict[str, Any] = {
    "name": "tiny",
    "rounds": 2,
    "clients": 3,
    "data": {
        "dataset": {"name": "synthetic", "classes": 4, "size": 8, "per_class": 60},
        "partition": {"name": "dirichlet", "alpha": 1.0, "min_size": 5},
        "transfer": {"size": 48},
        "test": 60,
    },
    "teachers": {"models": ["mlp", "cnn_tiny"], "epochs": 2},
    "student": {"model": {"name": "cnn_tiny", "norm": "batch"}},
    "fusion": ["class_gated", "entropy"],
    "distillation": {"losses": ["dkd", "vrm", {"name": "ce", "weight": 0.5}], "epochs": 2},
}


@pytest.fixture(scope="module", autouse=True)
def no_pages(request: pytest.FixtureRequest) -> Iterator[None]:
    """Runs draw no page, which takes longer than the run, but in a module with `PAGES = True`."""
    job = sys.modules.get("fedkd.simulations.job")
    if job is None or getattr(request.module, "PAGES", False):
        yield
    else:
        with mock.patch.object(job, "write_report"):
            yield


@pytest.fixture
def lean() -> None:
    """Runs of `tiny` measure no baselines."""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Shared:
    """`shared("rounds=3", ...)`: a finished lean run that tests of a module only read."""

    @cache
    def run(*overrides: str) -> RunDirectory:
        from fedkd.simulations.local import run_local

        output = f"output={tmp_path_factory.mktemp('shared')}"
        return run_local(make_experiment(TINY, [output, "evaluation.baselines=[]", *overrides]))

    return run


@pytest.fixture
def tiny(tmp_path: Path, request: pytest.FixtureRequest) -> Tiny:
    """`tiny("rounds=3", ...)`: the tiny experiment with overrides, writing under tmp_path."""
    first = [f"output={tmp_path / 'runs'}"]
    if "lean" in request.fixturenames:
        first.append("evaluation.baselines=[]")

    def make(*overrides: str) -> Experiment:
        return make_experiment(TINY, [*first, *overrides])

    return make
