"""A few mutated inputs of every kind: no traceback, no hang, exit codes as documented."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fuzz.engine import Command
from tests.fuzz.fuzzing import attempt, named
from tests.fuzz.makers import MAKERS
from tests.fuzz.material import Material

CASES = int(os.environ.get("FEDKD_FUZZ", "18"))  # of all kinds together


@pytest.fixture(scope="module")
def command() -> Iterator[Command]:
    started = Command()
    yield started
    started.close()


@pytest.fixture(scope="module")
def material(command: Command, tmp_path_factory: pytest.TempPathFactory) -> Material:
    return Material(command, tmp_path_factory.mktemp("material"))


@pytest.mark.timeout(0)  # every command has a limit of its own
@pytest.mark.parametrize("kind", MAKERS)
def test_whatever_comes_in_a_message_and_a_code_come_out(
    kind: str, command: Command, material: Material, tmp_path: Path
) -> None:
    faults = []
    for seed in range(CASES // len(MAKERS)):
        case, _, wrong = attempt(kind, seed, tmp_path / named(kind, seed), command, material)
        if wrong:
            faults.append(f"{kind} {seed}: {wrong}\n    {case.words}\n    {case.changes}")
    assert not faults, "\n".join(faults)
