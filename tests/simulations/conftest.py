"""The command as a user meets it, in this process."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Fedkd = Callable[..., tuple[int, str, str]]


@pytest.fixture
def fedkd(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Fedkd:
    """`fedkd("attack", ...)` from an empty folder: exit code, stdout and stderr."""
    from fedkd.simulations.cli.main import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "150")
    monkeypatch.setattr(sys, "path", list(sys.path))

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fedkd", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return call
