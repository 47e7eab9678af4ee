import sys

import numpy as np
import pytest
import torch

from fedkd.reporting.run_figures import partition_figure


@pytest.mark.parametrize(
    ("clients", "classes"), [(1, 2), (3, 10), (8, 20), (100, 10), (5, 100), (60, 100)]
)
def test_a_picture_of_any_size_can_be_saved(tmp_path, clients, classes):
    counts = np.random.default_rng(0).integers(0, 50, (clients, classes))
    figure = partition_figure(counts, [f"class {i}" for i in range(classes)], title="who has what")
    file = tmp_path / "picture.png"
    figure.savefig(file, dpi=30)
    assert file.stat().st_size > 1000
    assert max(figure.get_size_inches()) <= 18


def test_no_pyplot_is_loaded_and_empty_clients_are_fine(tmp_path):
    before = "matplotlib.pyplot" in sys.modules
    figure = partition_figure(torch.zeros(3, 2, dtype=torch.int64), ("a", "b"))
    figure.savefig(tmp_path / "picture.svg")
    assert ("matplotlib.pyplot" in sys.modules) == before


def test_counts_and_names_must_fit():
    with pytest.raises(ValueError, match=r"counts must be \(clients, 3 classes\), got \(2, 4\)"):
        partition_figure(np.zeros((2, 4)), ("a", "b", "c"))


def test_a_dollar_in_the_name_of_a_class_starts_no_formula(tmp_path):
    figure = partition_figure(np.ones((2, 3)), ["$x^", "[red]", "a_b$"], title="$^")
    figure.savefig(tmp_path / "picture.png", dpi=30)
    assert (tmp_path / "picture.png").stat().st_size > 1000
