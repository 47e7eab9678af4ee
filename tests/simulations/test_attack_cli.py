"""`fedkd attack` and `fedkd quarantine` as a user meets them."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from fedkd.config import load_config
from fedkd.runs.directory import RunDirectory
from fedkd.runs.quarantine import strike
from fedkd.simulations.cli.tables import console_table
from fedkd.studies.attack.config import AttackConfig
from fedkd.studies.attack.report import costs_table
from fedkd.studies.attack.study import AttackStudy
from fedkd.studies.engine import Record, StudyFolder, run_study


def results(config: AttackConfig, folder: Path) -> Record:
    study = AttackStudy(config)
    return run_study(study, StudyFolder(folder, study.config))


def test_many_rules_fit_a_narrow_terminal() -> None:
    rules = [f"density_ratio → a_rule_with_a_long_name_{n}" for n in range(8)]
    cell = {"accuracy": 0.9, "cost": 1.5}
    rows = {threat: dict.fromkeys(rules, cell) for threat in ("clean", "absent", "collude")}
    facts = {"name": "wide", "worst": dict.fromkeys(rules), "rows": rows}
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(console_table(costs_table(facts)))
    text = console.export_text()
    assert text.count("1.5") == 16
    assert text.count("90.0") == 8
    for number, rule in enumerate(rules, start=1):
        assert f"{number}: {rule}" in text
    assert max(map(len, text.splitlines())) <= 80


def test_quarantine_is_shown_and_lifted(fedkd, tiny) -> None:
    run = RunDirectory.new(tiny("federation.quarantine.after=1"))
    code, out, _ = fedkd("quarantine", run.path)
    assert (code, out.strip()) == (0, "no strikes")
    strike(run, 2, 1, "NaN in 1 of 9 numbers")
    code, out, _ = fedkd("quarantine", run.path)
    assert "yes" in out
    assert "round 2: NaN in 1 of 9 numbers" in out
    code, out, _ = fedkd("quarantine", run.path, "--lift", 1)
    assert "client 1: 1 strikes forgotten" in out
    assert "no strikes" in out
    code, _, err = fedkd("quarantine", run.path, "--lift", 7)
    assert (code, err.strip()) == (2, "fedkd: --lift 7: this run's clients are 0 to 2")


@pytest.mark.slow
def test_garbage_costs_at_most_a_point(tmp_path: Path) -> None:
    """Goal: broken senders, three of ten clients, cost the student at most one point."""
    study = load_config(
        AttackConfig, "configs/attack/quickstart.yaml",
        ["attacks=[nan,infinity,huge,wrong_shape,duplicate]", "rules=[uniform]"],
    )  # fmt: skip
    for row in results(study, tmp_path)["rows"].values():
        assert all(cell["cost"] <= 1 for cell in row.values())


@pytest.mark.slow
def test_the_robust_chain_bears_three_attackers_of_ten(tmp_path: Path) -> None:
    """Goal: at most three points in all and about ten of a class, lies about claims included."""
    study = load_config(
        AttackConfig, "configs/attack/robust.yaml",
        [
            "rules=[[consensus, {name: density_ratio, by_size: false, limit: 1.0}, dawid_skene]]",
            "attacks=[collude,inflate,cpa,label_noise,permuted,shift,part_time,half_familiar,"
            "runner_up,{name: runner_up, margin: 0.35, own: true},mirror,everywhere,focus,"
            "{name: focus, source: 1, target: 7},{name: focus, elsewhere: 0.5},"
            "{name: backdoor, more: 1.3}]",
        ],
    )  # fmt: skip
    facts = results(study, tmp_path)
    (robust,) = [rule for rule in facts["worst"] if "dawid_skene" in rule]
    cells = {name: row[robust] for name, row in facts["rows"].items()}
    assert {name: cell["cost"] for name, cell in cells.items() if cell["cost"] > 3} == {}
    assert {n: c["class_cost"] for n, c in cells.items() if c["class_cost"] > 12} == {}
    assert cells["clean"]["against_default"] < 0.5
    assert facts["worst"]["density_ratio"]["cost"] > 20
