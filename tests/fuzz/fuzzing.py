"""One case from end to end."""

from pathlib import Path
from random import Random

from tests.fuzz.engine import LIMIT, Case, Command, Outcome, problem
from tests.fuzz.makers import MAKERS
from tests.fuzz.material import Material


def named(kind: str, seed: int) -> str:
    """The folder of a case, below others; some have names that would be markup, and letters."""
    return f"{kind} [/{seed}] ünïcode" if seed % 4 == 0 else f"{kind}-{seed}"


def attempt(
    kind: str, seed: int, place: Path, command: Command, material: Material, limit: float = LIMIT
) -> tuple[Case, Outcome, str | None]:
    """Make the case, call the command, judge."""
    place.mkdir(parents=True)
    case = MAKERS[kind](Random(f"{kind} {seed}"), place, material)
    got = command(case.words, case.cwd, limit)
    return case, got, problem(case, got)
