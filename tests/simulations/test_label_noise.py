"""Wrong labels in whole runs: whoever trains believes them, and nobody reads the true ones."""

import io
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from fedkd.build import build_data, check
from fedkd.config import ConfigError, make_experiment
from fedkd.data.images import ImageSet
from fedkd.data.label_noise import LabelNoise, with_label_noise
from fedkd.reporting.run_record import Found
from fedkd.reporting.run_tables import teachers_table
from fedkd.rounds import ExperimentContext
from fedkd.runs.directory import RunDirectory
from fedkd.simulations.baselines import BASELINES
from fedkd.simulations.cli.tables import partition_table
from fedkd.simulations.deploy.folder import deployable
from fedkd.simulations.deploy.plan import Plan
from fedkd.simulations.local import run_local
from fedkd.studies.audit.study import unseen
from tests.conftest import TINY, Tiny

NOISE = "data.label_noise={kind: symmetric, rate: 0.6, clients: 0.67}"
SMALL = (
    "rounds=1", "teachers.epochs=1", "distillation.epochs=1", "data.test=20", "data.private=60",
    "teachers.models=[mlp]", "student.model=mlp",
)  # fmt: skip


@pytest.fixture
def absurd(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From its call on, the true labels of noisy images are all 0."""

    def noise(images: ImageSet, parts: Sequence[np.ndarray], noise: LabelNoise, *, seed: int):
        noisy = with_label_noise(images, parts, noise, seed=seed)
        assert noisy.true_labels is not None
        return replace(noisy, true_labels=torch.zeros_like(noisy.true_labels))

    def begin() -> None:
        monkeypatch.setattr("fedkd.rounds.context._CONTEXTS", OrderedDict())
        monkeypatch.setattr("fedkd.data.splits.with_label_noise", noise)

    return begin


def digest(run: RunDirectory) -> tuple[str, Any]:
    summary = run.read_json("summary.json")
    return summary["hash"], summary["ceiling"]


def column(run: RunDirectory) -> list[str] | None:
    """The shares of wrong labels in the table of teachers."""
    table = teachers_table(Found(run))
    titles = [column.title for column in table.columns]
    if "wrong labels" not in titles:
        return None
    cells = [row.cells[titles.index("wrong labels")] for row in table.rows]
    return [str(cell) for cell in cells]


def test_teachers_and_student_know_the_given_labels_alone(
    tiny: Tiny, absurd: Callable[[], None]
) -> None:
    words = (*SMALL, "evaluation.baselines=[ceiling]")
    clean, noisy = run_local(tiny(*words)), run_local(tiny(*words, NOISE))
    assert "wrong_labels" not in clean.read_json("summary.json")
    wrong = noisy.read_json("summary.json")["wrong_labels"]
    assert sum(share == 0 for share in wrong) == 1  # one of three clients has none
    assert column(noisy) == [f"{100 * share:.1f} %" for share in wrong]
    assert column(clean) is None
    absurd()
    blind = run_local(tiny(*words, NOISE))
    assert digest(blind) == digest(noisy)
    assert digest(noisy)[0] != digest(clean)[0]
    assert max(blind.read_json("summary.json")["wrong_labels"]) != max(wrong)


def test_shares_of_wrong_labels_stay_inside_with_a_promise(tiny: Tiny) -> None:
    words = ("teachers.privacy={mechanism: label_dp, epsilon: 1.0}", "evaluation.baselines=[]")
    words = (*words, "fusion=uniform", "evaluation.clients=false")
    run = run_local(tiny(*SMALL, NOISE, *words))
    assert "wrong_labels" not in run.read_json("summary.json")
    assert Found(run).wrong_labels is None


def test_every_baseline_trains_on_the_given_labels(absurd: Callable[[], None]) -> None:
    noise = "data.label_noise={kind: pair, rate: 1.0}"

    def outcomes(*words: str) -> dict[str, Any]:
        context = ExperimentContext(make_experiment(TINY, [*SMALL, *words]))
        found = {}
        for name in BASELINES.names():
            if name.endswith("_lora"):
                continue  # needs a file of weights, and trains as fedavg does
            outcome = BASELINES.create(name).run(context, lambda _: None)
            found[name] = [(r.accuracy, r.ece, r.per_class) for r in outcome.rounds]
        return found

    noisy = outcomes(noise)
    absurd()
    assert outcomes(noise) == noisy
    clean = outcomes()
    assert [name for name in noisy if noisy[name] == clean[name]] == []


def test_the_partition_shows_the_share_of_wrong_labels(tiny: Tiny) -> None:
    data = build_data(tiny("data.label_noise={kind: pair, rate: 0.5}"))
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(partition_table(data.class_counts(), data.classes, data.wrong_labels()))
    text = console.export_text()
    assert "wrong" in text
    assert "50.0 %" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.label_noise={kind: some, rate: 0.5}"], "data.label_noise.kind: .*'symmetric'"),
        (["data.label_noise.kind=pair"], "data.label_noise.rate: kind 'pair' needs a share"),
        (["data.label_noise={kind: file}"], "data.label_noise.file: kind 'file' needs"),
        (["data.label_noise={kind: pair, rate: 0.5, clients: 0}"], "data.label_noise.clients: "),
        ([NOISE, "data.public=public.npz"], "data.label_noise: changes the labels that are dealt"),
    ],
)
def test_what_cannot_be_is_refused_before_images_are_read(
    tiny: Tiny, words: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check(tiny(*words))


def test_maps_and_files_that_do_not_fit_are_refused(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"^data: label_noise.kind: 'asymmetric' knows"):
        build_data(tiny("data.label_noise={kind: asymmetric, rate: 0.5}"))
    np.savez(tmp_path / "labels.npz", worst=np.zeros(10, np.int64))
    monkeypatch.setenv("FEDKD_DATA", str(tmp_path))
    with pytest.raises(ConfigError, match=r"^data: label_noise.file: .*10 labels for 240 training"):
        build_data(tiny("data.label_noise={kind: file, file: labels.npz}"))


def test_real_nodes_and_audits_refuse_it(tiny: Tiny) -> None:
    with pytest.raises(ConfigError, match=r"data\.label_noise: real nodes train on the labels"):
        deployable(tiny(NOISE), Plan(3, ("localhost",)))
    with pytest.raises(ConfigError, match=r"data\.label_noise: .*audit a run without it"):
        unseen(ExperimentContext(tiny(NOISE)))
