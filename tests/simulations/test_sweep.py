"""Privacy sweeps: what each row promises, and that no promise is the plain path."""

import csv
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedkd.config import ConfigError, make_config
from fedkd.runs.directory import RunDirectory
from fedkd.simulations.compare.figures import budget_figure
from fedkd.simulations.compare.report import result_table
from fedkd.simulations.compare.study import SweepStudy
from fedkd.simulations.compare.sweep import Sweep
from fedkd.simulations.compare.teachers import teachers_key
from fedkd.simulations.local import run_local
from fedkd.studies.engine import StudyFolder, run_study
from tests.conftest import TINY, Tiny

Make = Callable[..., Sweep]

DP: dict[str, Any] = {
    "teachers.privacy": {"nominal_size": 40, "delta": 1e-3, "accountant": "rdp"},
    "teachers.models": ["mlp"],
    "fusion": ["entropy"],
}
VOTES: dict[str, Any] = {
    "release": {"name": "gnmax", "min_votes": 3, "queries": 24},
    "distillation.losses": ["ce"],
    "fusion": ["uniform"],
}


@pytest.fixture
def sweep(tmp_path: Path) -> Make:
    def make(**more: Any) -> Sweep:
        values: dict[str, Any] = {"experiment": TINY | {"rounds": 1}, "epsilons": ["inf", 5]}
        values |= {"output": str(tmp_path)}
        return make_config(Sweep, values | {"mechanisms": {"dp_sgd": DP, "votes": VOTES}} | more)

    return make


def test_every_mechanism_meets_every_budget(sweep: Make) -> None:
    rows = {entry.name: entry.experiment for entry in sweep().entries()}
    assert list(rows) == ["dp_sgd-inf", "dp_sgd-5", "votes-inf", "votes-5"]
    private = rows["dp_sgd-5"].teachers.privacy
    assert (private.epsilon, private.nominal_size) == (5.0, 40)
    assert rows["votes-5"].release.options["epsilon"] == 5.0
    assert not rows["dp_sgd-inf"].promises
    assert not rows["votes-inf"].promises
    # All else is the same at every budget.
    for one, other in (("dp_sgd-inf", "dp_sgd-5"), ("votes-inf", "votes-5")):
        a, b = (rows[name].model_dump(mode="json") for name in (one, other))
        for values in (a, b):
            del values["release"], values["teachers"]["privacy"]
        assert a == b


@pytest.mark.parametrize(
    ("mechanisms", "words"),
    [
        ({"none": {"fusion": ["uniform"]}}, "mechanisms.none: needs exactly one of"),
        ({"both": DP | VOTES}, "mechanisms.both: needs exactly one of"),
        ({"x": {"release": {"name": "gnmax", "epsilon": 3}}}, "x.release: leave epsilon out"),
        ({}, "mechanisms"),
    ],
)
def test_what_is_no_mechanism_is_refused(
    sweep: Make, mechanisms: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        sweep(mechanisms=mechanisms)


def test_a_leak_is_refused_before_anything_runs(sweep: Make) -> None:
    leaky = DP | {"fusion": ["class_gated"]}
    with pytest.raises(ConfigError, match=r"dp_sgd-5: fusion: 'class_gated' discloses"):
        SweepStudy(sweep(mechanisms={"dp_sgd": leaky})).check()


@pytest.mark.parametrize("epsilons", [[0], [-1.0], [math.nan], [2, 2]])
def test_impossible_budgets_are_refused(sweep: Make, epsilons: list[float]) -> None:
    with pytest.raises(ConfigError, match="epsilons"):
        sweep(epsilons=epsilons)


def test_teachers_under_a_budget_are_never_shared(sweep: Make) -> None:
    keys = {entry.name: teachers_key(entry.experiment) for entry in sweep().entries()}
    assert keys["dp_sgd-5"] is None
    assert keys["dp_sgd-inf"] is not None


def test_the_picture_shows_all_draws_of_a_release() -> None:
    students = {"votes": {"1": [0.2, 0.4, 0.9], "inf": [0.7]}}
    figure = budget_figure(["1", "inf"], students, {})
    (line,) = (line for line in figure.axes[0].get_lines() if len(line.get_xdata()) == 2)
    assert list(line.get_ydata()) == pytest.approx([0.5, 0.7])


def test_a_sweep_ends_with_table_and_picture_and_inf_is_the_plain_path(
    sweep: Make, tiny: Tiny
) -> None:
    config = sweep(draws=2)
    folder = StudyFolder.new(config)
    found = run_study(SweepStudy(config), folder)
    assert found["finished"]
    rows = found["rows"]
    assert rows["dp_sgd-inf"]["spent"] is None
    assert rows["dp_sgd-inf"]["noise"] is None
    ahead = config.outlooks()
    assert {name: one.ratio for name, one in ahead.items()} == {
        name: row["noise"]["mean"] for name, row in rows.items() if row["noise"] is not None
    }
    assert 4.9 < rows["dp_sgd-5"]["spent"]["mean"] <= 5.0
    assert rows["votes-5"]["spent"]["mean"] == pytest.approx(5.0, rel=1e-6)
    assert rows["dp_sgd-5"]["teachers"]["mean"] > 0
    assert list(rows["votes-5"]["seeds"]) == ["0", "0, draw 2"]
    assert found["promises"].startswith("3 private runs on the same images are 3 promises")
    assert rows["votes-5"]["teachers"] is None  # not covered, so not shown
    page = (folder.path / "report.html").read_text(encoding="utf-8")
    assert "Accuracy for epsilon" in page
    assert "noise / signal, %" in page
    assert "3 private runs on the same images" in page
    with (folder.path / "results.csv").open(encoding="utf-8") as file:
        assert [line["epsilon"] for line in csv.DictReader(file)] == ["inf", "5", "inf", "5", "5"]
    assert len(result_table(found).rows) == 4

    plain = run_local(tiny("rounds=1", "teachers.models=[mlp]", "fusion=[entropy]"))
    swept = RunDirectory.open(folder.path / "methods" / "dp_sgd-inf" / "seed0")
    assert swept.read_json("summary.json")["hash"] == plain.read_json("summary.json")["hash"]

    assert StudyFolder.open(folder.path, Sweep).config.epsilons == (math.inf, 5.0)
