import io

import torch
from rich.console import Console

from simulations.cli.tables import partition_table


def test_names_of_classes_are_shown_as_they_are():
    names = ("[red]", "[/]", "a, b", "<b>", "[link=x]y", "naïve", "x" * 300)
    out = io.StringIO()
    Console(file=out, width=160).print(partition_table(torch.arange(14).reshape(2, 7), names))
    text = out.getvalue()
    assert all(name in text for name in names[:4])
    assert "naïve" in text
    assert "xxxxxxxx…" in text
