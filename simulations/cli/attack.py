"""`fedkd attack`: every attack on every fusion rule."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fedkd.config import ConfigError
from simulations.cli.arguments import Overrides, TeacherWeights
from simulations.cli.configs import load


def attack(
    config: Annotated[
        str | None, typer.Argument(help="a YAML file, e.g. configs/attack/quickstart.yaml")
    ] = None,
    overrides: Overrides = None,
    resume: Annotated[Path | None, typer.Option(help="go on with this study's folder")] = None,
    trust: TeacherWeights = False,
) -> None:
    """Try attacks on the knowledge against fusion rules: what does each cost the student?"""
    from fedkd.attacks.config import AttackStudy, check_study, resolved
    from fedkd.config import import_trusted, load_config
    from fedkd.io.records import check_tree
    from fedkd.runs.directory import new_folder
    from fedkd.studies.attack import run_matrix
    from fedkd.studies.attack_report import table, write
    from simulations.cli.live import Interrupted
    from simulations.cli.screen import screen
    from simulations.cli.steps import StepView
    from simulations.machine import check_machine

    if resume is not None:
        if config is not None:
            raise ConfigError("--resume takes its config from the folder; give no config beside it")
        folder = resume.expanduser().resolve()
        check_tree(folder)
        study = load_config(AttackStudy, folder / "config.yaml", plugins=False)
        import_trusted(study.plugins, folder, trust=trust)
    elif config is None:
        raise ConfigError("give a config file, e.g. fedkd attack configs/attack/quickstart.yaml")
    else:
        study = load(AttackStudy, config, overrides or [], "attack")
        check_study(study)
        check_machine(study.experiment, workers=False)
        study = resolved(study)
        folder = new_folder(study.output, study.name, study)
    console = screen()
    try:
        with StepView(console, f"study   {folder}") as view:
            results = run_matrix(study, folder, view)
    except Interrupted:
        trusted = " --trust" if study.plugins else ""
        print(f"interrupted; go on with: fedkd attack --resume {folder}{trusted}", file=sys.stderr)
        sys.exit(130)
    page = write(study, results, folder)
    console.print(costs_table(table(study, results)))
    console.print(f"report  {page}", soft_wrap=True, highlight=False, markup=False)


def costs_table(facts: dict[str, Any]) -> Any:
    """Clean accuracy and costs by rule; rules that do not fit are numbered."""
    from rich.table import Table

    shown = Table(
        title=f"{facts['name']}: test accuracy clean (%), then points lost to each attack",
        title_justify="left",
    )
    rules = [*facts["worst"]]
    short = sum(len(rule) + 3 for rule in rules) <= 60
    if not short:  # a number for each, told below
        shown.caption = "\n".join(f"{number}: {rule}" for number, rule in enumerate(rules, 1))
        shown.caption_justify = "left"
    shown.add_column("attack", no_wrap=True)
    for number, rule in enumerate(rules, start=1):
        shown.add_column(rule if short else str(number), justify="right")
    for number, (threat, row) in enumerate(facts["rows"].items()):
        cells = [row[rule] for rule in rules]
        key, factor = ("accuracy", 100) if number == 0 else ("cost", 1)
        shown.add_row(threat, *("–" if c is None else f"{factor * c[key]:.1f}" for c in cells))
        if number < 2:
            shown.add_section()
    return shown
