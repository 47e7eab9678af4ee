"""Comparisons: what they leave, resume, survive, share and refuse."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedkd.config import ConfigError, load_config, make_config
from fedkd.rounds import ExperimentContext, Interrupted
from fedkd.runs.directory import RunDirectory
from fedkd.simulations.baselines import BASELINES
from fedkd.simulations.baselines.base import Baseline, OnRound, Outcome, RoundResult
from fedkd.simulations.compare.config import Comparison
from fedkd.simulations.compare.results import spread
from fedkd.simulations.compare.study import CompareStudy, read_run
from fedkd.simulations.compare.teachers import teachers_key
from fedkd.simulations.local import run_local
from fedkd.studies.engine import Record, StudyFolder, run_study
from tests.conftest import TINY

CALLS: list[int] = []


class Fake(Baseline):
    """Two rounds of known numbers: 0.5 and 0.4, and 0.01 more per seed."""

    def __init__(self, *, fails_on: int = -1, lead: float = 0.0) -> None:
        self.fails_on = fails_on
        self.lead = lead

    def run(self, workspace: ExperimentContext, on_round: OnRound) -> Outcome:
        seed = workspace.experiment.seed
        CALLS.append(seed)
        if seed == self.fails_on:
            raise RuntimeError("no such luck\nsecond line")
        rounds = tuple(
            RoundResult(
                round=number,
                accuracy=accuracy + self.lead + 0.01 * seed,
                per_class=[accuracy, 1.0, float("nan"), None],
                ece=0.125,
                up=1000,
                down=500,
                seconds=0.5,
            )
            for number, accuracy in ((1, 0.5), (2, 0.4))
        )
        for result in rounds:
            on_round(result)
        return Outcome(rounds, (0.75, None, 0.25), torch.zeros(60, 4))


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    """`fake` is a baseline, and nobody has run it yet."""
    BASELINES.names()
    monkeypatch.setitem(BASELINES._members, "fake", Fake)
    CALLS.clear()


Make = Callable[..., Comparison]


@pytest.fixture
def comparison(tmp_path: Path) -> Make:
    """`comparison(["fedkd", "fake"], seeds=[0, 1], ...)` on the tiny federation."""

    def make(methods: list[Any], **more: Any) -> Comparison:
        given = {"experiment": TINY, "output": str(tmp_path / "runs"), "methods": methods, **more}
        return make_config(Comparison, given)

    return make


Folder = StudyFolder[Comparison]


def run_all(folder: Folder, notify: Any = lambda *_, **__: None, **options: bool) -> Record:
    return run_study(CompareStudy(folder.config, **options), folder, notify)


def numbers(value: Any) -> Any:
    """The results without what depends on the clock."""
    if isinstance(value, dict):
        return {k: numbers(v) for k, v in value.items() if k not in ("seconds", "wall")}
    return [numbers(item) for item in value] if isinstance(value, list) else value


def test_without_seeds_the_experiments_own_seed_is_the_one(comparison: Make) -> None:
    assert comparison(["fake"]).seeds == (TINY.get("seed", 0),)
    given = {**TINY, "seed": 7}
    assert comparison(["fake"], experiment=given).seeds == (7,)
    assert comparison(["fake"], experiment=given, seeds=[1, 2]).seeds == (1, 2)


# -- what comes out --------------------------------------------------------------------------------


def test_a_baselines_numbers_are_kept_with_final_and_best_apart(comparison: Make) -> None:
    folder = Folder.new(comparison(["fake"], seeds=[0, 1]))
    found = run_all(folder)
    row = found["rows"]["fake"]
    assert found["finished"]
    assert row["final"]["mean"] == pytest.approx(0.405)
    assert row["final"]["std"] == pytest.approx(0.01 / 2**0.5)
    assert row["best"]["mean"] == pytest.approx(0.505)
    assert row["seeds"]["0"]["best_round"] == 1
    assert row["worst_client"]["mean"] == 0.25
    assert (row["up"]["mean"], row["down"]["mean"]) == (2000, 1000)
    assert row["transfer"]["mean"] == 3 * 48 * 8 * 8  # clients x images x pixels x grey
    assert row["per_class"] == [0.4, 1.0, None, None]


def test_deviation_is_that_of_a_sample_and_unknown_for_one_seed() -> None:
    assert spread([1.0, 3.0]) == {"mean": 2.0, "std": pytest.approx(2**0.5), "n": 2}
    assert spread([1.0, None]) == {"mean": 1.0, "std": None, "n": 1}
    assert spread([None]) is None


def test_csv_and_report_show_every_row_and_the_report_no_markup(comparison: Make) -> None:
    folder = Folder.new(
        comparison(["fake", {"name": "odd", "baseline": "fake", "fails_on": 1}], seeds=[0, 1])
    )
    run_all(folder)
    lines = list(csv.reader((folder.path / "results.csv").read_text().splitlines()))
    assert lines[0] == [
        "name", "kind", "seed", "final", "best", "best_round", "worst_client", "ece", "up", "down",
        "transfer", "seconds", "joules", "multiply_adds", "teachers", "spent", "error",
    ]  # fmt: skip
    assert lines[1] == [
        "fake", "fake", "0", "0.4", "0.5", "1", "0.25", "0.125", "2000", "1000", "9216", "1.0",
        "", "64608", "", "", "",
    ]  # fmt: skip
    assert [line[:3] for line in lines[2:]] == [
        ["fake", "fake", "1"], ["odd", "fake", "0"], ["odd", "fake", "1"],
    ]  # fmt: skip
    assert lines[4][3:] == [""] * 13 + ["RuntimeError: no such luck"]
    rounds = list(csv.reader((folder.path / "rounds.csv").read_text().splitlines()))
    assert rounds[0][3:] == ["round", "accuracy", "ece", "up", "down", "seconds"]
    assert len(rounds) == 1 + 3 * 2
    assert rounds[2] == ["fake", "fake", "0", "2", "0.4", "0.125", "1000", "500", "0.5"]
    page = (folder.path / "report.html").read_text()
    assert page.count("<svg") == 3
    assert "odd, seed 1 failed: RuntimeError: no such luck" in page
    assert "40.50 ± 0.71" in page
    assert page.count("<script") == 1


def test_fedkd_runs_its_real_path_and_counts_only_its_own_messages(
    comparison: Make, tmp_path: Path
) -> None:
    config = comparison(["fedkd"])
    folder = Folder.new(config)
    record = run_all(folder)["rows"]["fedkd"]["seeds"]["0"]
    experiment = config.entries()[0].seeded(0)
    alone = run_local(experiment, run=RunDirectory.new(experiment, tmp_path / "alone"))
    outcome = read_run(alone)
    assert record["final"] == alone.read_json("summary.json")["student"]["accuracy"]
    assert [each["accuracy"] for each in record["rounds"]] == [r.accuracy for r in outcome.rounds]
    ledger = alone.messages()
    assert sum(r.up for r in outcome.rounds) == sum(
        entry.up for entry in ledger if entry.phase != "evaluate"
    )
    assert any(entry.phase == "evaluate" for entry in ledger)
    # Client answers do not hold the path of the run's folder, so they are equal to the byte.
    train = [entry.up for entry in ledger if entry.phase == "knowledge"]
    kept = RunDirectory.open(folder.path / "methods" / "fedkd" / "seed0").messages()
    assert sum(train) > 10_000
    assert abs(sum(e.up for e in kept if e.phase == "knowledge") - sum(train)) < 500
    assert not (folder.path / "methods" / "fedkd" / "seed0" / "knowledge").exists()


# -- resume ----------------------------------------------------------------------------------------


def test_fedkds_own_rounds_go_on_where_they_were_interrupted(comparison: Make) -> None:
    config = comparison(["fedkd"])
    whole = run_all(Folder.new(config))
    folder = Folder.new(config)

    def interrupt(event: str, **_: Any) -> None:
        if event == "round":
            raise Interrupted

    with pytest.raises(Interrupted):
        run_all(folder, interrupt)
    again: list[int] = []

    def listen(event: str, **facts: Any) -> None:
        if event == "round":
            again.append(facts["round"])

    found = run_all(Folder.open(folder.path, Comparison), listen)
    assert again == [2]
    assert numbers(found["rows"]) == numbers(whole["rows"])


def test_results_outlive_a_new_key_of_the_config_but_not_a_changed_one(comparison: Make) -> None:
    folder = Folder.new(comparison(["fake"]))
    run_all(folder)
    place = folder.path / "methods" / "fake" / "seed0.json"
    record = json.loads(place.read_text())

    def runs(**changes: Any) -> bool:
        """Whether a result of these older settings is done again."""
        older = {**record["settings"]["experiment"], **changes}
        del older["release"]  # as if the key had come since
        place.write_text(json.dumps({**record, "settings": {"experiment": older, "baseline":
                                     record["settings"]["baseline"]}}))  # fmt: skip
        CALLS.clear()
        run_all(Folder.open(folder.path, Comparison))
        return bool(CALLS)

    assert not runs()
    assert runs(rounds=record["settings"]["experiment"]["rounds"] + 1)
    assert runs(no_longer_there=1)


# -- shared teachers -------------------------------------------------------------------------------


def test_shared_teachers_change_nothing_but_the_time(comparison: Make) -> None:
    methods = [
        "fedkd",
        {"name": "uniform", "fedkd": {"fusion": "uniform", "data.views.strength": "weak"}},
    ]
    config = comparison(methods, experiment={**TINY, "rounds": 3})
    shared, apart = Folder.new(config), Folder.new(config)
    together = run_all(shared)
    alone = run_all(apart, share=False)
    assert numbers(together["rows"]) == numbers(alone["rows"])
    assert [path.name for path in (shared.path / "teachers").iterdir()] == [
        teachers_key(config.entries()[0].seeded(0))
    ]
    # Three rounds of three clients, though a client keeps its last two teachers only.
    assert len(list((shared.path / "teachers").rglob("teacher-*.pt"))) == 9
    assert not (apart.path / "teachers").exists()
    student = [
        RunDirectory.open(folder.path / "methods/uniform/seed0").read_json("summary.json")["hash"]
        for folder in (shared, apart)
    ]
    assert student[0] == student[1]
    saved = json.loads((shared.path / "methods/uniform/seed0/saved.json").read_text())
    assert sorted(saved) == ["1", "2", "3"]
    assert not json.loads((shared.path / "methods/fedkd/seed0/saved.json").read_text())


@pytest.mark.parametrize(
    ("change", "shares"),
    [
        ("fusion=uniform", True),
        ("distillation.epochs=7", True),
        ("student.model=mlp", True),
        ("data.views.strength=weak", True),
        ("rounds=9", True),
        ("seed=1", False),
        ("clients=4", False),
        ("teachers.epochs=9", False),
        ("data.transfer.size=40", False),
        ("resources.client_cpus=2", False),
    ],
)
def test_teachers_are_shared_exactly_if_they_are_the_same(
    tiny: Callable[..., Any], change: str, shares: bool
) -> None:
    assert (teachers_key(tiny(change)) == teachers_key(tiny())) == shares


def test_teachers_with_feedback_are_never_shared(tiny: Callable[..., Any]) -> None:
    assert teachers_key(tiny("teachers.feedback.use=align")) is None


# -- what the user got wrong -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("methods", "expected"),
    [
        (["fakee"], "methods.fakee: unknown baseline 'fakee'; did you mean 'fake'?"),
        ([{"name": "fake", "leed": 1}], "baseline 'fake' has no option 'leed'; did you mean"),
        (
            [{"name": "mine", "fedkd": {"fusoin": "uniform"}}],
            "methods.mine.fedkd: fusoin: unknown key; did you mean 'fusion'?",
        ),
        ([{"name": "mine", "fedkd": {"fusion": "uniforn"}}], "did you mean 'uniform'?"),
        (
            [{"name": "mine", "fedkd": {"data.private": 10}}],
            "data.private is the same for all methods",
        ),
        ([{"name": "fedkd", "fusion": "uniform"}], "belongs below `fedkd:` (got 'fusion')"),
        (["fake", "fake"], "methods: 'fake' is listed twice"),
        ([{"name": "a/b", "fedkd": {}}], "methods.0.name: "),
        ([], "methods: "),
    ],
)
def test_what_does_not_exist_is_one_line(
    comparison: Make, methods: list[Any], expected: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        CompareStudy(comparison(methods)).check()
    assert expected in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_resolved_config_reads_back_as_itself(comparison: Make, tmp_path: Path) -> None:
    methods = ["fedkd", "fake", {"name": "mine", "fedkd": {"fusion": ["uniform", "entropy"]}}]
    config = comparison(methods, only="mine")
    (tmp_path / "again.yaml").write_text(config.to_yaml())
    assert load_config(Comparison, tmp_path / "again.yaml") == config
    assert [entry.name for entry in config.entries()] == ["mine"]
