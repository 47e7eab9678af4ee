"""No value of a path has moved, and each comes out the same twice."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.golden.file import differences, expected
from tests.golden.machine import machine
from tests.golden.paths import PATHS, values_of

PAGES = True  # where a path asks for one
SMOKE = ("resume", "privacy", "unlearn", "contribution", "audit", "distill", "attack", "api")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.smoke] if n in SMOKE else []) for n in PATHS]
)
def test_no_value_moved(name: str, tmp_path: Path) -> None:
    here = machine()
    kept = expected(here)
    found = values_of(name, tmp_path / "one")
    if not any(value.startswith(f"{name}: ") for value in kept):
        again = differences(name, values_of(name, tmp_path / "two"), found)
        assert not again, "not the same twice:\n" + "\n".join(again)
        pytest.skip(f"no values of this machine to compare with ({here}): tests/golden/__init__.py")
    moved = differences(name, kept, found)
    assert not moved, "\n".join([*moved, "if it is meant: python -m tests.golden --write"])
