"""A federation whose classes are uneven, as in medicine, from a file as MedMNIST publishes them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedkd.config import make_experiment
from fedkd.data.datasets import load_dataset
from fedkd.reporting.run_page import make_page
from fedkd.reporting.run_record import Found
from fedkd.reporting.run_tables import detection_table
from fedkd.rounds import ExperimentContext
from fedkd.runs.directory import RunDirectory
from fedkd.runs.events import RoundFinished
from fedkd.simulations.local import run_local
from tests.conftest import TINY

CLIENTS = 3


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Grey 28x28 images with a bright spot in one of five, under MedMNIST's names."""
    generator, arrays = np.random.default_rng(0), {}
    for part, count in (("train", 300), ("val", 10), ("test", 100)):
        labels = (np.arange(count) % 5 == 0).astype(np.uint8)
        images = generator.integers(0, 90, (count, 28, 28), dtype=np.uint8)
        images[labels == 1, 8:20, 8:20] += 120
        arrays |= {f"{part}_images": images, f"{part}_labels": labels[:, None]}
    file = tmp_path_factory.mktemp("scans") / "spotmnist.npz"
    np.savez(file, **arrays)
    return file


def uneven(scans: Path, *words: str) -> Any:
    data = {
        "dataset": {"name": "npz", "path": str(scans)}, "partition": "iid",
        "transfer": {"size": 60}, "holdout": 0.3,
    }  # fmt: skip
    teachers = {"models": ["mlp"], "epochs": 3}
    values = {**TINY, "data": data, "teachers": teachers, "rounds": 1, "fusion": ["uniform"],
              "student": {"model": "mlp"}, "evaluation": {"baselines": []},
              "distillation": {"losses": ["kd"], "epochs": 3}}  # fmt: skip
    return make_experiment(values, [f"output={scans.parent / 'runs'}", *words])


@pytest.fixture(scope="module")
def finished(scans: Path) -> RunDirectory:
    return run_local(uneven(scans))


def test_uneven_classes_are_measured_without_being_asked_for(finished: RunDirectory) -> None:
    summary = finished.read_json("summary.json")
    assert set(summary["detection"]) == {"student", "ensemble", "0", "1", "2"}
    assert set(summary["detection_on_holdout"]) == {"0", "1", "2"}
    for values in (*summary["detection"].values(), *summary["detection_on_holdout"].values()):
        assert all(0 <= values[name] <= 1 for name in ("balanced_accuracy", "auc", "sensitivity"))
    assert summary["detection"]["student"]["auc"] > 0.9


def test_the_page_shows_them_for_each_client(finished: RunDirectory) -> None:
    found = Found(RunDirectory.open(finished.path))
    both = [detection_table(found, clients=clients) for clients in (False, True)]
    assert [len(table.rows) if table else 0 for table in both] == [2, 2 * CLIENTS]
    titles = [card.title for section in make_page(found).sections for card in section.cards if card]
    assert "Uneven classes" in titles


@pytest.mark.parametrize(("choice", "words"), [("off", ()), ("auto", ("data.test=1",))])
def test_where_nobody_asks_or_classes_are_even_nothing_is_said(
    scans: Path, choice: str, words: tuple[str, ...]
) -> None:
    experiment = uneven(scans, f"evaluation.detection={choice}", *words)
    assert not ExperimentContext(experiment).detects
    assert ExperimentContext(uneven(scans, "evaluation.detection=on", *words)).detects


def test_students_do_not_depend_on_what_is_measured(
    finished: RunDirectory, scans: Path, lean: None
) -> None:
    off = run_local(uneven(scans, "evaluation.detection=off"))
    rounds = [run.events(RoundFinished)[-1] for run in (finished, off)]
    assert rounds[0].hash == rounds[1].hash
    assert not rounds[1].detection
    assert "detection" not in off.read_json("summary.json")


def test_a_long_tail_is_the_same_every_time_and_keeps_every_class() -> None:
    (train, test), (again, _) = (load_dataset("long_tail", of="digits", ratio=9) for _ in range(2))
    counts = train.class_counts().tolist()
    assert counts[0] == max(counts)
    assert counts == sorted(counts, reverse=True)
    assert counts[0] / counts[-1] == pytest.approx(9, rel=0.1)
    assert min(test.class_counts().tolist()) >= 1
    assert train.fingerprint() == again.fingerprint()
    for options, message in (
        ({"ratio": 0.5}, "ratio must be a number from 1, got 0.5"),
        ({"of": "long_tail"}, "of: expected another data set"),
        ({"of": {"path": "x.npz"}}, "of: expected another data set"),
        ({"of": "digitz"}, "unknown data set 'digitz'"),
    ):
        with pytest.raises(ValueError, match=message):
            load_dataset("long_tail", **options)
