"""`fedkd compare`, `ablate`, `attack` and `distill`: studies from their config, or gone on with."""

from __future__ import annotations

from typing import Annotated

from fedkd.simulations.cli.arguments import Overrides, Trust, a_study, keys
from fedkd.simulations.cli.study import Jobs, Resume, run_command


def compare(
    config: Annotated[str | None, a_study("compare/quickstart.yaml")] = None,
    overrides: Annotated[
        list[str] | None, keys("seeds=[0,1] only=[fedkd,fedavg] experiment.rounds=2")
    ] = None,
    resume: Resume = None,
    trust: Trust = False,
    jobs: Jobs = 1,
) -> None:
    """Compare fedkd and baselines on one split: accuracy, bytes, calibration, several seeds."""
    run_command("compare", config, overrides, resume, trust=trust, jobs=jobs)


def ablate(
    config: Annotated[str | None, a_study("ablate/fusion.yaml")] = None,
    overrides: Annotated[
        list[str] | None, keys("seeds=[0,1] mode=each experiment.rounds=2")
    ] = None,
    resume: Resume = None,
    trust: Trust = False,
    jobs: Jobs = 1,
) -> None:
    """Try a grid of options over several seeds: which choice matters, and what it costs."""
    run_command("ablate", config, overrides, resume, trust=trust, jobs=jobs)


def attack(
    config: Annotated[str | None, a_study("attack/quickstart.yaml")] = None,
    overrides: Overrides = None,
    resume: Resume = None,
    trust: Trust = False,
    jobs: Jobs = 1,
) -> None:
    """Try attacks on the knowledge against fusion rules: what does each cost the student?"""
    run_command("attack", config, overrides, resume, trust=trust, jobs=jobs)


def distill(
    config: Annotated[str | None, a_study("distill/digits.yaml")] = None,
    overrides: Annotated[
        list[str] | None, keys("only=[kd,dkd] experiment.distillation.epochs=5")
    ] = None,
    resume: Resume = None,
    trust: Trust = False,
    jobs: Jobs = 1,
) -> None:
    """Compare distillation methods in one place: teachers, a student per method and seed."""
    run_command("distill", config, overrides, resume, trust=trust, jobs=jobs)
