"""FedAvg as a benchmark: weighted, counted, and the same every time."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedkd.build import build_data, build_network
from fedkd.config import Experiment
from fedkd.evaluation import evaluate
from fedkd.models.network import parameter_count
from fedkd.randomness import stream_seed
from fedkd.teachers.sgd import fit

Tiny = Callable[..., Experiment]


@pytest.fixture(scope="module")
def fedavg() -> dict[str, Any]:
    """The script's names; other distributions install a `benchmarks` package as well."""
    return runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "fedavg.py"))


def test_fedavg_is_the_same_every_time_and_every_byte_is_counted(
    tiny: Tiny, fedavg: dict[str, Any]
) -> None:
    experiment = tiny()
    rows, _ = fedavg["run_fedavg"](experiment)
    assert fedavg["run_fedavg"](experiment)[0] == rows
    assert [row["round"] for row in rows] == [1, 2]
    network = build_network(experiment, experiment.student.model, build_data(experiment), "student")
    weights = 3 * 4 * parameter_count(network)  # three clients, float32
    assert all(weights < row[way] < weights + 3 * 10_000 for row in rows for way in ("down", "up"))
    assert fedavg["totals"](rows)[1] == sum(row["down"] + row["up"] for row in rows)


def test_with_one_client_fedavg_is_plain_training(tiny: Tiny, fedavg: dict[str, Any]) -> None:
    experiment = tiny("clients=1", "rounds=1", "data.partition=iid")
    data = build_data(experiment)
    network = build_network(experiment, experiment.student.model, data, "student")
    seed = stream_seed(experiment.seed, "teach", 0, 1)
    fit(network, data.shard(0), experiment.teachers, seed=seed)
    assert fedavg["run_fedavg"](experiment)[0][0]["accuracy"] == evaluate(network, data.test)


def test_both_sides_share_one_table(
    tiny: Tiny, fedavg: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text(tiny("rounds=1").to_yaml(), encoding="utf-8")
    fedavg["main"]([str(config), "--output", str(tmp_path), "evaluation.baselines=[]"])
    shown = capsys.readouterr().out
    assert "times the bytes of fedkd" in shown
    assert (tmp_path / "fedavg-tiny-seed0.json").is_file()
