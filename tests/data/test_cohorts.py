from collections import Counter
from typing import Any

import pytest

from fedkd.data import SAMPLERS
from fedkd.data.cohorts import (
    Cohort,
    Sampler,
    draw_cohort,
    how_many,
    most_rounds,
)
from fedkd.io.text import from_ranges, ranges

OPTIONS: dict[str, dict[str, Any]] = {
    "schedule": {"cohorts": [[0, 1, 2], [3, 4, 5, 6], [7, 8, 9]]},
    "trace": {"there": {2: "1-3, 7-", 3: "", "9": "5"}},
}


def draw(name: str = "uniform", number: int = 1, **values: Any) -> Cohort:
    options = values.pop("options", OPTIONS.get(name, {}))
    given = {"clients": 10, "ask": 0.3, "seed": 5, "sizes": lambda: range(10, 20)}
    return draw_cohort(Sampler.of(name, options), round_number=number, **(given | values))


@pytest.mark.parametrize("name", SAMPLERS.names())
def test_a_cohort_is_a_function_of_seed_round_and_who_is_there(name: str) -> None:
    there = {0, 1, 2, 3, 5, 6, 8}
    drawn = [draw(name, number, there=there) for number in range(1, 9)]
    assert drawn == [draw(name, number, there=sorted(there)) for number in range(1, 9)]
    for cohort in drawn:
        assert len(set(cohort.asked)) == len(cohort.asked) <= cohort.wanted
        assert set(cohort.asked) <= set(cohort.there) <= there


@pytest.mark.parametrize("name", ["uniform", "size", "trace"])
def test_another_seed_or_round_draws_others(name: str) -> None:
    asked = {draw(name, number, seed=seed, ask=5).asked for seed in (1, 2) for number in (1, 2, 3)}
    assert len(asked) == 6


@pytest.mark.parametrize("name", ["uniform", "size", "round_robin", "trace"])
def test_one_that_is_away_gives_its_place_to_one_other(name: str) -> None:
    whole = draw(name, ask=3)
    left = draw(name, ask=3, there=set(range(10)) - {whole.asked[1]})
    assert len(left.asked) == 3
    assert left.asked[:2] == (whole.asked[0], whole.asked[2])


def test_shares_and_counts() -> None:
    assert [how_many(ask, 20) for ask in ("all", 0.4, 8, 0.001, 1.0, 1, 30)] == [
        20, 8, 8, 1, 20, 1, 20,
    ]  # fmt: skip


def test_a_share_is_one_of_all_clients_or_of_those_that_are_there() -> None:
    there = {1, 2, 3, 4}
    assert (draw(there=there, ask=0.5).wanted, len(draw(there=there, ask=0.5).asked)) == (5, 4)
    assert draw(there=there, ask=0.5, elastic=True).wanted == 2


def test_spares_follow_in_the_order_of_the_draw() -> None:
    assert draw(ask=4).asked == draw(ask=4, spare=0.5).asked[:4]
    assert (draw(ask=4, spare=0.5).wanted, len(draw(ask=4, spare=0.5).asked)) == (4, 6)


def test_uniform_asks_everybody_as_often_as_any_other() -> None:
    times = Counter(c for number in range(1, 3001) for c in draw("uniform", number).asked)
    assert max(abs(times[client] - 900) for client in range(10)) < 100  # four deviations


def test_size_asks_in_proportion_to_images() -> None:
    sizes = {"sizes": [100, 300, 0, 600]}
    times = Counter(
        draw("size", number, clients=4, ask=1, options=sizes).asked[0] for number in range(1, 2001)
    )
    assert times[2] == 0
    assert [times[c] / 2000 for c in (0, 1, 3)] == pytest.approx([0.1, 0.3, 0.6], abs=0.04)


def test_round_robin_goes_through_all_in_turn() -> None:
    asked = [
        client for number in (1, 2, 3, 4) for client in draw("round_robin", number, ask=5).asked
    ]
    assert asked == [*range(10)] * 2
    assert draw("round_robin", 4).asked == (9, 0, 1)


def test_a_schedule_comes_again_and_counts_its_own_clients() -> None:
    assert [draw("schedule", n, ask="all").asked for n in (1, 2, 3, 4)] == [
        (0, 1, 2), (3, 4, 5, 6), (7, 8, 9), (0, 1, 2),
    ]  # fmt: skip
    assert draw("schedule", 2, ask=0.5).asked == (3, 4)


def test_a_trace_says_who_is_there() -> None:
    def absent(number: int) -> set[int]:
        return set(range(10)) - set(draw("trace", number, ask="all").there)

    assert [absent(n) for n in (1, 4, 5, 7)] == [{3, 9}, {2, 3, 9}, {2, 3}, {3, 9}]


def test_only_fixed_cohorts_bound_how_often_a_client_is_asked() -> None:
    def most(name: str) -> int:
        return most_rounds(Sampler.of(name, OPTIONS.get(name, {})), clients=10, rounds=7, seed=0)

    assert {name: most(name) for name in SAMPLERS.names()} == {
        "round_robin": 7, "schedule": 3, "size": 7, "trace": 7, "uniform": 7,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("schedule", {"cohorts": [[0, 10]]}, "names client 10: clients are 0 to 9"),
        ("schedule", {"cohorts": [[0, 0]]}, "none of them empty or with one twice"),
        ("schedule", {"cohorts": [[]]}, "none of them empty"),
        ("trace", {"there": {1: "3 to 5"}}, "there.1: expected rounds like '1-3, 7-'"),
        ("trace", {"there": {12: "3"}}, "there: client 12: clients are 0 to 9"),
        ("size", {"sizes": [1, 2]}, "expected 10 counts of images, got 2"),
    ],
)
def test_a_mistake_is_named(name: str, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        draw(name, options=options)


def test_ranges_are_short_and_read_back() -> None:
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"
    assert ranges([]) == ""
    assert from_ranges("0-2,5,7-8") == [0, 1, 2, 5, 7, 8]
    assert from_ranges("") == []
