"""What a figure shows in words and numbers, and in which colours."""

import json
import re

import numpy as np
import pytest

from fedkd.reporting import drawing
from fedkd.reporting.format import counted, gap
from fedkd.reporting.page import Card, Page, Section, render
from fedkd.reporting.run_figures import accuracy_figure
from fedkd.reporting.table import Cell, Row, Table, numbers, words


@pytest.fixture(scope="module")
def drawn() -> tuple[str, drawing.Reading]:
    lines = {"student": [0.25, 0.75], "ensemble": [0.5, np.nan], "pseudo-labels": [np.nan] * 2}
    teachers = {0: [0.1, 0.2], 7: [0.3, 0.4]}
    return drawing.svg(accuracy_figure([1, 2], lines, teachers, {"oracle": 0.9}), "figure1")


def test_values_are_those_that_were_drawn(drawn: tuple[str, drawing.Reading]) -> None:
    values = json.loads(drawn[1].values())
    texts = {series["n"]: series["t"] for series in values["series"]}
    assert texts == {
        "teacher 0": ["round 1 · 10.0 %", "round 2 · 20.0 %"],
        "teacher 7": ["round 1 · 30.0 %", "round 2 · 40.0 %"],
        "ensemble": ["round 1 · 50.0 %"],
        "student": ["round 1 · 25.0 %", "round 2 · 75.0 %"],
        "oracle": ["90.0 %"],
    }
    heights = {series["n"]: series["p"][0][1] for series in values["series"]}
    assert heights["oracle"] < heights["ensemble"] < heights["student"] < heights["teacher 0"]


def test_each_entry_of_the_legend_has_what_it_switches(drawn: tuple[str, drawing.Reading]) -> None:
    marks = re.findall(r'<g data-k="(\d)"( data-legend)?', drawn[0])
    entries = {key for key, entry in marks if entry}
    assert entries == {key for key, entry in marks if not entry} == {"0", "1", "2", "3"}
    keys = {series.label: series.key for series in drawn[1].series}
    assert keys["teacher 0"] == keys["teacher 7"]  # one entry for all teachers


def test_the_finding_names_what_matters_first(drawn: tuple[str, drawing.Reading]) -> None:
    assert (
        drawn[1]
        .finding()
        .startswith(
            "ensemble: round 1 · 50.0 %. student: from round 1 · 25.0 % to round 2 · 75.0 %. "
            "oracle: 90.0 %. teacher 0"
        )
    )


def test_colours_are_those_of_the_page(drawn: tuple[str, drawing.Reading]) -> None:
    text = drawn[0]
    assert "var(--student)" in text
    assert "var(--ink)" in text
    assert not re.search(r"(fill|stroke): #(0072b2|24292f|6a737d|e4e7eb)", text, re.I)


def test_cells_of_a_heat_map_are_read(drawn: tuple[str, drawing.Reading]) -> None:
    figure, axes = drawing.canvas(4, 3)
    table = np.asarray([[1.0, -2.0], [np.nan, 5.0]])
    drawing.heat(
        axes, table, drawing.SIGNED, (-5, 5), rows=["a", "b\n3 clients"], columns=["x", "y"]
    )
    _, reading = drawing.svg(figure, "figure1")
    (grid,) = reading.grids
    assert (grid["rows"], grid["columns"]) == (["a", "b"], ["x", "y"])
    assert grid["t"] == [["1", "\N{MINUS SIGN}2"], ["not known", "5"]]
    left, top, right, bottom = grid["box"]
    assert 0 <= left < right <= 4 * 72
    assert 0 <= top < bottom <= 3 * 72
    assert reading.finding() == "least a, y: \N{MINUS SIGN}2; most b, y: 5"


def test_an_interval_is_wilsons_and_holds_at_the_ends() -> None:
    assert counted(0.9, 100) == "82.6\N{EN DASH}94.5, n 100"
    assert counted(0.0, 13) == "0.0\N{EN DASH}22.8, n 13"
    assert counted(0.5, None) == counted(None, 10) == ""


def test_a_gap_within_noise_is_told_apart() -> None:
    assert gap([0.05, 0.06, 0.055], 0.055) == ("+5.50 ± 1.24", False)
    assert gap([0.05, -0.04, 0.02], 0.01)[1] is True
    assert gap([0.05], 0.05) == ("+5.00", True)


def test_what_others_wrote_stays_text_in_values_links_and_configs() -> None:
    evil = "'><b onclick=x>\"&"
    line = drawing.Line(evil, [1, 2], [[0.1, 0.2]], {"color": drawing.INK})
    rows = [Row([Cell(evil, link=evil), "1"], series=evil)]
    table = Table([*words("name"), *numbers("n")], rows)
    card = Card(evil, evil, [drawing.curves([line], "round")], table, configs={evil: {evil: evil}})
    text = render(Page(evil, evil, [Section("s", "S", [card])], evil))
    assert "<b onclick" not in text
    (values,) = re.findall(r"data-values='([^']*)'", text)
    assert json.loads(values.replace("&#39;", "'").replace("&lt;", "<").replace("&gt;", ">")
                      .replace("&amp;", "&"))["series"][0]["n"] == evil  # fmt: skip
