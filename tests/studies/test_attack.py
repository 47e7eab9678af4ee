"""The matrix on a tiny federation: real refusals, costs, resume, the page."""

from collections.abc import Callable
from pathlib import Path

import pytest

from fedkd.attacks.config import AttackStudy, check_study, resolved
from fedkd.config import ConfigError, Experiment, make_config
from fedkd.io.records import read_json
from fedkd.studies.attack import CLEAN, Cell, attackers_of, cells, run_matrix
from fedkd.studies.attack_report import table, write
from simulations.local import run_local

Tiny = Callable[..., Experiment]


@pytest.fixture
def tiny(tiny: Tiny, pageless: None) -> Tiny:
    """Without what only measures, and without its page."""
    return lambda *words: tiny("evaluation.baselines=[]", *words)


def make(tiny: Tiny, *overrides: str, **values: object) -> AttackStudy:
    experiment = tiny("teachers.models=[mlp]", "student.model=mlp", "fusion=[uniform]", *overrides)
    given = {"experiment": experiment.model_dump(mode="json"), "rules": ["class_gated"], **values}
    return make_config(AttackStudy, given)


def test_a_matrix_measures_refusals_and_costs_and_goes_on(tiny: Tiny, tmp_path: Path) -> None:
    study = make(tiny, attacks=["nan", "collude", "inflate", "label_noise", "copycat", "replay"])
    check_study(study)
    heard: list[str] = []
    results = run_matrix(study, tmp_path, lambda event, **_: heard.append(event))
    assert heard.count("teacher") == 3 + 1
    assert heard.count("cell") == 2 * 8 == len(results) == len(cells(study))
    (attacker,) = attackers_of(study, 0)
    clean, absent, nan, collude, inflate, replay = (
        results[Cell(0, "uniform", name)]
        for name in (CLEAN, "absent", "nan", "collude", "inflate", "replay")
    )
    assert clean["refused"] == {}
    assert sum(nan["refused"].values()) == 2  # one attacker, two rounds
    assert all("NaN" in reason for reason in nan["refused"])
    # What is refused is like silence, and a rule that asks for no sizes cannot be lied to.
    assert nan["hash"] == absent["hash"] != clean["hash"]
    assert inflate["hash"] == collude["hash"] != absent["hash"]
    assert sum(replay["refused"].values()) == 1
    gated = Cell(0, "class_gated", "inflate"), Cell(0, "class_gated", "collude")
    assert results[gated[0]]["hash"] != results[gated[1]]["hash"]
    assert all(r["attackers"] == [attacker] for c, r in results.items() if c.threat != CLEAN)
    assert not list(tmp_path.rglob("knowledge"))

    for number in (1, 2):  # cells that are lost are made again, and come out the same
        lost = tmp_path / "cells" / "seed0" / "rule00" / f"attack{number:02d}.json"
        lost.unlink()
    heard.clear()
    assert run_matrix(study, tmp_path, lambda event, **_: heard.append(event)) == results
    assert heard.count("cell") == 2

    facts = table(study, results)
    assert [*facts["rows"]][:3] == ["clean", "absent", "nan"]
    row = facts["rows"]["collude"]["class_gated"]
    own = results[Cell(0, "class_gated", CLEAN)]["accuracy"]
    assert row["cost"] == pytest.approx(100 * (own - row["accuracy"]))
    assert row["against_default"] == pytest.approx(100 * (clean["accuracy"] - row["accuracy"]))
    by_class = results[Cell(0, "class_gated", "collude")]["per_class"]
    lost = [a - b for a, b in zip(results[Cell(0, "class_gated", CLEAN)]["per_class"], by_class)]
    assert row["class_cost"] == pytest.approx(100 * max(lost))
    assert facts["rows"]["nan"]["uniform"]["refused"] == 2
    assert facts["worst"]["uniform"]["cost"] == max(
        cells["uniform"]["cost"]
        for name, cells in facts["rows"].items()
        if name not in (CLEAN, "absent")
    )
    page = write(study, results, tmp_path).read_text(encoding="utf-8")
    assert page.count("<svg") == 1
    assert "1 of 3 clients attack" in page
    assert "The class that loses most" in page
    assert read_json(tmp_path / "attack.json")["default"] == "uniform"


def test_the_clean_cell_is_the_student_of_a_run(tiny: Tiny, tmp_path: Path) -> None:
    study = make(tiny, rules=["entropy"], attacks=["nan"])
    results = run_matrix(study, tmp_path)
    run = run_local(study.experiment.model_copy(update={"output": str(tmp_path / "runs")}))
    assert results[Cell(0, "uniform", CLEAN)]["hash"] == run.metrics("round")[-1]["hash"]


@pytest.mark.parametrize(
    ("values", "overrides", "message"),
    [
        ({"attacks": ["lmaa"]}, (), "attacks.0: unknown attack 'lmaa'; did you mean 'lma'"),
        ({"attacks": [{"name": "shift", "amont": 2}]}, (), "has no option 'amont'"),
        ({"rules": [["uniform", "entropi"]]}, (), "rules.0.1: unknown fusion 'entropi'"),
        ({"share": 1.0}, (), "share: 3 of 3 clients would attack"),
        ({"seeds": []}, (), "seeds: at least one"),
        ({}, ("federation.codec=int",), "expected float16 or float32, got 'int'"),
        ({}, ("teachers.feedback.use=regulariser",), "teachers are trained once"),
    ],
)
def test_impossible_studies_are_refused(
    tiny: Tiny, values: dict[str, object], overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_study(make(tiny, *overrides, **values))


def test_labels_and_defaults(tiny: Tiny) -> None:
    study = make(tiny, rules=[["class_gated", {"name": "entropy", "temperature": 0.5}], "uniform"])
    assert [*study.chains()] == ["uniform", "class_gated → entropy(temperature=0.5)"]
    everything = make(tiny, rules=[], attacks=[])
    assert {"uniform", "entropy", "class_gated"} <= set(everything.chains())
    assert next(iter(everything.threats())) == "absent"
    assert len(everything.threats()) > 20
    named = resolved(everything)
    assert [*named.chains()] == [*everything.chains()]
    assert [*named.threats()] == [*everything.threats()]
    assert len(named.rules) > 4
    assert make(tiny, share=0.01).num_attackers == 1
