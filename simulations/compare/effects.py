"""Main effects and two-way tables of an ablation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

Cell = tuple[Mapping[str, str], float]
"""What was chosen (factor -> choice), and the accuracy."""


def main_effects(
    cells: Iterable[Cell], order: Mapping[str, Sequence[str]], *, each: bool = False
) -> dict[str, dict[str, list[float]]]:
    """Factor -> choice -> accuracies of the cells that have it.

    Args:
        cells: Those that are finished.
        order: Factor -> its choices, the reference first.
        each: Only cells whose other factors are all at their reference.
    """
    known = list(cells)
    return {
        factor: {
            choice: [
                value
                for chosen, value in known
                if chosen[factor] == choice
                and (not each or all(chosen[o] == order[o][0] for o in order if o != factor))
            ]
            for choice in choices
        }
        for factor, choices in order.items()
    }


def two_way(cells: Iterable[Cell], order: Mapping[str, Sequence[str]]) -> list[list[float | None]]:
    """Accuracies of two factors: a row per choice of the first, a column per one of the second."""
    first, second = order
    found = {(chosen[first], chosen[second]): value for chosen, value in cells}
    return [[found.get((row, column)) for column in order[second]] for row in order[first]]
