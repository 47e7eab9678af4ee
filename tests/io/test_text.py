"""What comes from others is text, wherever it is shown."""

import csv
import io
import logging
from pathlib import Path

import pytest
from rich.table import Table
from typer.testing import CliRunner

from fedkd.data.pictures import shown
from fedkd.io.text import REASON, PlainFormatter, cell, plain, visible
from fedkd.reporting.table import write_csv
from fedkd.simulations.cli.main import app
from fedkd.simulations.cli.screen import screen

HOSTILE = "\x1b]0;pwn\x07\x1b[2J\x1b]8;;http://evil\x07here\x9b31m\u202e"
COMMANDS = ("\x1b]", "\x1b[2J", "\x07", "\x9b", "\u202e")


def harmless(text: str) -> bool:
    return not any(command in text for command in COMMANDS)


def test_reasons_lose_escapes_and_names_show_them() -> None:
    assert plain(HOSTILE) == "here 31m"
    assert plain("red\x1b[31m \x9b2J\u202egnp.exe\r\nnext\x00") == "red 2J gnp.exe next"
    assert plain("a" * 1000).endswith("…")
    assert len(plain("a" * 10**7)) == REASON
    assert visible(HOSTILE).startswith("\\x1b]0;pwn\\x07\\x1b[2J")
    assert visible("näme 字\n", keep="\n") == "näme 字\n"
    assert harmless(shown(Path("a") / HOSTILE))
    record = logging.LogRecord("fedkd", 30, "f", 1, "two\nlines of %s", (HOSTILE,), None)
    text = PlainFormatter("%(message)s").format(record)
    assert harmless(text)
    assert text.startswith("two\nlines of \\x1b")


@pytest.mark.parametrize("terminal", [False, True])
def test_the_screen_shows_text_and_keeps_its_own_colours(terminal: bool) -> None:
    file = io.StringIO()
    colours = "standard" if terminal else None
    console = screen(file=file, force_terminal=terminal, width=200, color_system=colours)
    table = Table(title=HOSTILE)
    table.add_column(HOSTILE)
    table.add_row(f"[link=http://evil]{HOSTILE}[/link]", style="red")
    console.print(table)
    console.print(HOSTILE, soft_wrap=True)
    console.print("[link=http://evil]click[/link]")
    text = file.getvalue()
    assert harmless(text)
    assert "\\x1b]0;pwn" in text
    assert ("\x1b[31m" in text) == terminal


def test_status_of_a_run_shows_no_escapes(tmp_path: Path) -> None:
    from fedkd.config import make_experiment
    from fedkd.runs.directory import RunDirectory
    from fedkd.runs.events import ReplyRefused, Strike

    run = RunDirectory.new(make_experiment({"output": str(tmp_path)}))
    run.record(ReplyRefused(round=1, phase="train", client=0, reason=HOSTILE))
    run.record(Strike(round=1, client=0, reason=f"[bold]{HOSTILE}"))
    for verb in ("status", "quarantine"):
        result = CliRunner().invoke(app, [verb, str(run.path)])
        assert result.exit_code == 0, result.output
        assert "pwn" in result.output
        assert harmless(result.output)


def test_cells_of_a_table_are_no_formulas(tmp_path: Path) -> None:
    rows = [["=cmd|' /C calc'!A0", "+1", "-2+3", "@x", -1.5, None, "kd", "\tx", "a\x1b[2J"]]
    assert [cell(value) for value in rows[0][3:6]] == ["'@x", -1.5, None]
    write_csv(tmp_path / "table.csv", rows)
    (read,) = csv.reader(io.StringIO((tmp_path / "table.csv").read_text()))
    assert read == [
        "'=cmd|' /C calc'!A0", "'+1", "'-2+3", "'@x", "-1.5", "", "kd", "'\\tx", "a\\x1b[2J"
    ]  # fmt: skip
