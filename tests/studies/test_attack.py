"""The matrix on a tiny federation: real refusals, costs, resume, the page."""

from pathlib import Path

import pytest

from fedkd.config import ConfigError, make_config
from fedkd.runs.events import RoundFinished
from fedkd.simulations.local import run_local
from fedkd.studies.attack.config import CLEAN, AttackConfig, attackers_of, resolved
from fedkd.studies.attack.study import AttackStudy
from fedkd.studies.engine import Record, StudyFolder, run_study
from tests.conftest import Tiny

pytestmark = pytest.mark.usefixtures("lean")


def make(tiny: Tiny, *overrides: str, **values: object) -> AttackConfig:
    experiment = tiny("teachers.models=[mlp]", "student.model=mlp", "fusion=[uniform]", *overrides)
    given = {"experiment": experiment.model_dump(mode="json"), "rules": ["class_gated"], **values}
    return make_config(AttackConfig, given)


def run(config: AttackConfig, folder: Path, events: list[str]) -> tuple[Record, dict[str, Record]]:
    """The results, and what came out by cell."""
    study = AttackStudy(config)
    (folder / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    place = StudyFolder(folder, study.config)
    results = run_study(study, place, lambda event, **_: events.append(event))
    return results, {cell.name: place.result(cell) or {} for cell in study.cells}


def test_a_matrix_measures_refusals_and_costs(tiny: Tiny, tmp_path: Path) -> None:
    config = make(tiny, attacks=["nan", "collude", "inflate", "label_noise", "copycat", "replay"])
    AttackStudy(config).check()
    events: list[str] = []
    facts, cells = run(config, tmp_path, events)
    assert events.count("teacher") == 3 + 1
    assert events.count("cell_done") == 2 * 8 == len(cells)
    (attacker,) = attackers_of(config, 0)
    clean, absent, nan, collude, inflate, replay = (
        cells[f"uniform / {name}"]
        for name in (CLEAN, "absent", "nan", "collude", "inflate", "replay")
    )
    assert clean["refused"] == {}
    assert sum(nan["refused"].values()) == 2  # one attacker, two rounds
    assert all("NaN" in reason for reason in nan["refused"])
    # What is refused is like silence, and a rule that asks for no sizes cannot be lied to.
    assert nan["hash"] == absent["hash"] != clean["hash"]
    assert inflate["hash"] == collude["hash"] != absent["hash"]
    assert sum(replay["refused"].values()) == 1
    assert cells["class_gated / inflate"]["hash"] != cells["class_gated / collude"]["hash"]
    assert all(r["attackers"] == [attacker] for c, r in cells.items() if not c.endswith(CLEAN))
    assert not list(tmp_path.rglob("knowledge"))

    assert [*facts["rows"]][:3] == ["clean", "absent", "nan"]
    row = facts["rows"]["collude"]["class_gated"]
    own = cells["class_gated / clean"]
    assert row["cost"] == pytest.approx(100 * (own["accuracy"] - row["accuracy"]))
    assert row["against_default"] == pytest.approx(100 * (clean["accuracy"] - row["accuracy"]))
    by_class = cells["class_gated / collude"]["per_class"]
    lost = [a - b for a, b in zip(own["per_class"], by_class)]
    assert row["class_cost"] == pytest.approx(100 * max(lost))
    assert facts["rows"]["nan"]["uniform"]["refused"] == 2
    assert facts["worst"]["uniform"]["cost"] == max(
        cells["uniform"]["cost"]
        for name, cells in facts["rows"].items()
        if name not in (CLEAN, "absent")
    )
    assert facts["default"] == "uniform"
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 1
    assert "1 of 3 clients attack" in page
    assert "The class that loses most" in page


def test_the_clean_cell_is_the_student_of_a_run(tiny: Tiny, tmp_path: Path) -> None:
    """Also if a rule measures the teachers on the server's labelled images."""
    measured = ("fusion=[learned_gate]", "data.validation=30")
    config = make(tiny, *measured, rules=["entropy"], attacks=["nan"])
    _, cells = run(config, tmp_path, [])
    alone = run_local(config.experiment.model_copy(update={"output": str(tmp_path / "runs")}))
    last = alone.events(RoundFinished)[-1]
    assert cells["learned_gate / clean"]["hash"] == last.hash


@pytest.mark.parametrize(
    ("values", "overrides", "message"),
    [
        ({"attacks": ["lmaa"]}, (), "attacks.0: unknown attack 'lmaa'; did you mean 'lma'"),
        ({"attacks": [{"name": "shift", "amont": 2}]}, (), "has no option 'amont'"),
        ({"rules": [["uniform", "entropi"]]}, (), "rules.0.1: unknown fusion 'entropi'"),
        ({"share": 1.0}, (), "share: 3 of 3 clients would attack"),
        ({}, ("federation.codec=int",), "expected float16 or float32, got 'int'"),
        ({}, ("teachers.feedback.use=regulariser",), "teachers are trained once"),
        ({}, ("data.validation=9", "evaluation.best=true"), "student of the last round"),
    ],
)
def test_impossible_studies_are_refused(
    tiny: Tiny, values: dict[str, object], overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        AttackStudy(make(tiny, *overrides, **values)).check()


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
