"""What a CSV file gets of a table: numbers as they are, not as they are shown."""

from fedkd.reporting import format as fmt
from fedkd.reporting.table import Cell


def test_a_cell_keeps_its_number_and_unit() -> None:
    share = Cell(fmt.percent(0.123456789))
    assert (share.text, share.exact, share.unit) == ("12.3 %", "12.3456789", "%")
    both = Cell(fmt.spread({"mean": 0.5, "std": 0.0123456}))
    assert (both.text, both.exact) == ("50.00 ± 1.23", "50.0 1.23456")
    size = Cell(fmt.human_bytes(1234567))
    assert (size.text, size.exact, size.unit) == ("1.2 MB", "1234567.0", "bytes")
    assert Cell(fmt.duration(7.25)).exact == "7.25"
    assert Cell(fmt.metric(0.0012345, "J")).exact == "0.0012345"
    assert Cell(fmt.gap([0.01, 0.02], 0.015)[0]).exact.startswith("1.5 ")
    assert [Cell(text).exact for text in (fmt.number(None), "12.3 %")] == ["", ""]
    assert [fmt.human_bytes(0), fmt.human_bytes(None)] == ["0", fmt.DASH]
