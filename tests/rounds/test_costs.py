"""What a run has taken, as its summary says it."""

from dataclasses import replace

import pytest

from fedkd.config import make_experiment
from fedkd.reporting.costs import costs_table, run_lines
from fedkd.rounds import ExperimentContext
from fedkd.rounds.costs import costs_of
from fedkd.runs.directory import RunDirectory
from fedkd.runs.events import RoundFinished
from fedkd.training.evaluation import Scores
from tests.conftest import TINY, Shared

WATTS = "resources.energy.watts=100"
ROUND = RoundFinished(
    round=1,
    student=Scores(accuracy=0.5),
    seconds={"train": 4.0, "knowledge": 1.0, "fuse": 1.0, "distil": 2.0, "evaluate": 2.0},
    joules={"train": 40.0, "knowledge": 10.0, "fuse": 10.0, "distil": 20.0, "evaluate": 20.0},
    memory={"train": 300, "knowledge": 400, "fuse": 100, "distil": 200, "evaluate": 500},
    gpu_memory={"distil": 50},
)


def context(*words: str) -> ExperimentContext:
    return ExperimentContext(make_experiment(TINY, list(words)))


def test_joules_are_those_that_were_counted_or_assumed_and_marked() -> None:
    counted = costs_of(context(WATTS), [ROUND], clients_here=True)
    assert counted["energy"] == "measured by the machine"
    assert counted["teachers"] == {"seconds": 5.0, "joules": 50.0, "memory": 400}
    assert counted["student"] == {"seconds": 3.0, "joules": 30.0, "memory": 200, "gpu_memory": 50}
    assert counted["run"]["joules"] == 100.0
    partly = [ROUND, replace(ROUND, round=2, joules={})]  # a run that went on elsewhere
    assumed = costs_of(
        context(WATTS, "resources.energy.grams_per_kwh=360"), partly, clients_here=True
    )
    assert assumed["energy"] == "assumed at 100 W"
    assert assumed["run"]["joules"] == 2000.0
    assert assumed["run"]["grams"] == pytest.approx(0.2)
    unknown = costs_of(context(), partly, clients_here=True)
    assert (unknown["energy"], unknown["run"]["joules"]) == (None, None)


def test_of_clients_elsewhere_only_the_time_is_known() -> None:
    costs = costs_of(context(WATTS), [ROUND], clients_here=False)
    assert costs["teachers"] == {"seconds": 5.0}
    assert costs["run"] == {"seconds": 10.0}
    assert costs["student"]["joules"] == 30.0


def test_networks_are_counted_once_each() -> None:
    words = ("clients=5", "distillation.assistants=[mlp]")
    found = costs_of(context(*words), [ROUND], clients_here=True)["networks"]
    assert [(each["role"], each["model"], each["count"]) for each in found] == [
        ("teacher", "mlp", 3),
        ("teacher", "cnn_tiny", 2),
        ("assistant", "mlp", 1),
        ("student", "cnn_tiny", 1),
    ]
    assert found[0]["multiply_adds"] == found[2]["multiply_adds"] > 0


def test_a_run_says_what_it_took_and_its_student_does_not_depend_on_it(shared: Shared) -> None:
    run, other = shared(), shared(WATTS)
    costs = other.read_json("summary.json")["costs"]
    assert costs["run"]["joules"] == pytest.approx(100 * costs["run"]["seconds"])
    assert run.read_json("summary.json")["hash"] == other.read_json("summary.json")["hash"]
    assert other.events(RoundFinished)[-1].memory.keys() <= {*ROUND.seconds}
    table = costs_table(run_lines(costs), costs["energy"])
    assert [column.title for column in table.columns][-1] == "energy, assumed"
    rows = [row.cells[0].text for row in table.rows]  # type: ignore[union-attr]
    assert rows == ["teacher mlp", "teacher cnn_tiny", "teachers together", "student cnn_tiny",
                    "all rounds"]  # fmt: skip


def test_the_page_has_a_card_of_costs(shared: Shared) -> None:
    from fedkd.reporting.run_page import make_page
    from fedkd.reporting.run_record import Found

    page = make_page(Found(RunDirectory.open(shared(WATTS).path)))
    (section,) = [each for each in page.sections if each.key == "costs"]
    assert any("energy assumed at 100 W" in card.title for card in section.cards if card)
