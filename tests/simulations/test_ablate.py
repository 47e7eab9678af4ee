"""Ablations: which cells a grid has, what they change, what the page says of them."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedkd.config import ConfigError, load_config, make_config
from fedkd.simulations.compare.effects import main_effects, two_way
from fedkd.simulations.compare.grid import Ablation
from fedkd.simulations.compare.study import AblationStudy
from fedkd.studies.engine import StudyFolder, run_study
from tests.conftest import TINY

Make = Callable[..., Ablation]


@pytest.fixture
def ablation(tmp_path: Path) -> Make:
    """`ablation({"fusion": [...]}, mode="each", ...)` on the tiny federation."""

    def make(grid: dict[str, Any], **more: Any) -> Ablation:
        given = {"experiment": TINY, "output": str(tmp_path / "runs"), "grid": grid, **more}
        return make_config(Ablation, given)

    return make


GRID = {
    "fusion": ["uniform", ["class_gated", "entropy"]],
    "distillation.losses": {"plain": ["dkd"], "relations": ["dkd", {"name": "vrm", "weight": 2}]},
    "size": {
        "small": {"student.model": "cnn_tiny"},
        "large": {"student.model": "mlp", "distillation.epochs": 3},
    },
}


def test_a_grid_is_the_product_of_its_factors(ablation: Make) -> None:
    rows = ablation(GRID).entries()
    assert len(rows) == 8
    assert [dict(row.choices) for row in rows[:2]] == [
        {"fusion": "uniform", "distillation.losses": "plain", "size": "small"},
        {"fusion": "uniform", "distillation.losses": "plain", "size": "large"},
    ]
    last = rows[-1].experiment
    assert [rule.name for rule in last.fusion] == ["class_gated", "entropy"]
    assert [(term.name, term.weight) for term in last.distillation.losses] == [
        ("dkd", 1.0), ("vrm", 2.0),
    ]  # fmt: skip
    assert (last.student.model.name, last.distillation.epochs) == ("mlp", 3)
    assert rows[-1].name == "class_gated-+-entropy_relations_large"


def test_each_changes_one_factor_at_a_time(ablation: Make) -> None:
    rows = ablation(GRID, mode="each").entries()
    assert [row.name for row in rows] == [
        "uniform_plain_small",
        "class_gated-+-entropy_plain_small",
        "uniform_relations_small",
        "uniform_plain_large",
    ]


def test_experiments_repeat_the_grid_on_other_data(ablation: Make) -> None:
    config = ablation(
        {"fusion": ["uniform", "entropy"]}, experiments={"short": {"rounds": 1}, "long": {}}
    )
    assert [(row.name, row.experiment.rounds) for row in config.entries()] == [
        ("short_uniform", 1), ("short_entropy", 1), ("long_uniform", 2), ("long_entropy", 2),
    ]  # fmt: skip


CELLS = [
    ({"a": "x", "b": "p"}, 0.1),
    ({"a": "x", "b": "q"}, 0.2),
    ({"a": "y", "b": "p"}, 0.3),
    ({"a": "y", "b": "q"}, 0.4),
]
ORDER = {"a": ["x", "y"], "b": ["p", "q"]}


def test_main_effects_gather_the_cells_of_a_choice() -> None:
    assert main_effects(CELLS, ORDER) == {
        "a": {"x": [0.1, 0.2], "y": [0.3, 0.4]},
        "b": {"p": [0.1, 0.3], "q": [0.2, 0.4]},
    }


def test_one_at_a_time_effects_hold_the_others_at_the_reference() -> None:
    assert main_effects(CELLS, ORDER, each=True) == {
        "a": {"x": [0.1], "y": [0.3]},
        "b": {"p": [0.1], "q": [0.2]},
    }


def test_two_factors_make_a_table_with_gaps_where_nothing_is_finished() -> None:
    assert two_way(CELLS[:3], ORDER) == [[0.1, 0.2], [0.3, None]]


def test_an_ablation_ends_with_table_pictures_and_csv(ablation: Make) -> None:
    grid = {"fusion": ["uniform", "entropy"], "student.model": ["cnn_tiny", "mlp"]}
    study = AblationStudy(ablation(grid, experiment={**TINY, "rounds": 1}))
    folder = StudyFolder.new(study.config)
    found = run_study(study, folder)
    assert found["finished"]
    lines = list(csv.DictReader((folder.path / "results.csv").read_text().splitlines()))
    assert [(line["fusion"], line["student.model"]) for line in lines] == [
        ("uniform", "cnn_tiny"), ("uniform", "mlp"), ("entropy", "cnn_tiny"), ("entropy", "mlp"),
    ]  # fmt: skip
    assert all(0 < float(line["final"]) < 1 for line in lines)
    page = (folder.path / "report.html").read_text()
    assert page.count("<svg") == 2  # main effects, and a table of the two factors
    assert len(list((folder.path / "teachers").iterdir())) == 1  # four cells, the same teachers


@pytest.mark.parametrize(
    ("grid", "expected"),
    [
        ({"fusoin": ["uniform"]}, "grid.fusoin: no key of the experiment; did you mean 'fusion'?"),
        ({"fusion": ["uniforn"]}, "did you mean 'uniform'?"),
        ({"fusion": "uniform"}, "grid.fusion: expected a list of values or a mapping"),
        ({"fusion": ["uniform", "uniform"]}, "grid.fusion: 'uniform' is listed twice"),
        ({"seed": [0, 1]}, "grid.seed: use `seeds`"),
        ({"student.modle": ["mlp"]}, "student.modle: unknown key; did you mean 'model'?"),
        ({"a": {"x": {"rounds": 1}}, "b": {"x y": {}, "x-y": {}}}, "two cells have the same name"),
        ({}, "grid: "),
    ],
)
def test_what_does_not_exist_is_one_line(
    ablation: Make, grid: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        AblationStudy(ablation(grid)).check()
    assert expected in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_resolved_ablation_reads_back_as_itself(ablation: Make, tmp_path: Path) -> None:
    config = ablation(GRID, experiments={"short": {"rounds": 1}})
    (tmp_path / "again.yaml").write_text(config.to_yaml())
    assert load_config(Ablation, tmp_path / "again.yaml") == config
