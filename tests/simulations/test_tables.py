import io

import torch
from rich.console import Console

from fedkd.reporting.table import Cell, Row, Table, numbers, words
from fedkd.simulations.cli.tables import console_table, partition_table
from fedkd.simulations.compare.report import result_table


def shown(table, width=80):
    out = io.StringIO()
    Console(file=out, width=width).print(table)
    return out.getvalue()


def test_names_of_classes_are_shown_as_they_are():
    names = ("[red]", "[/]", "a, b", "<b>", "[link=x]y", "naïve", "x" * 300)
    text = shown(partition_table(torch.arange(14).reshape(2, 7), names), width=160)
    assert all(name in text for name in names[:4])
    assert "naïve" in text
    assert "xxxxxxxx…" in text


def test_a_table_is_text_and_its_numbers_are_never_broken():
    row = Row(["[red]", Cell("12,345", strong=True), "1.2 ± 3.4"], look="soft", begins=True)
    columns = [*words("who"), *numbers("a long heading of a number", "last round, %")]
    text = shown(console_table(Table(columns, [row] * 2, "[b]title", "note")), width=40)
    assert text.count("[red]") == text.count("12,345") == text.count("1.2 ± 3.4") == 2
    assert "[b]title" in text
    assert "┓" in text  # the right border: nothing was cut off
    assert max(map(len, text.splitlines())) <= 40


def test_an_ablation_of_three_factors_fits_a_narrow_terminal():
    factors = ["distillation.losses", "data.partition", "student.model"]
    spread = {"mean": 0.4321, "std": 0.0123}
    numbers = dict.fromkeys(("final", "best", "worst_client", "ece", "up", "down"), spread)
    row = {
        "kind": "fedkd", "about": "", "choices": dict.fromkeys(factors, "some_long_choice"),
        "has_student": True, "transfer": spread, "seconds": spread, "seeds": {"0": {}}, **numbers,
    }  # fmt: skip
    found = {
        "name": "grid", "study": "ablate", "factors": factors, "seeds": [0, 1], "errors": {},
        "rows": {"cell": row}, "tests": 200,
    }  # fmt: skip
    text = shown(console_table(result_table(found)))
    assert "43.21 ± 1.23" in text
    assert "┓" in text  # the right border: nothing was cut off
    assert max(map(len, text.splitlines())) <= 80
