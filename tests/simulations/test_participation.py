"""A part of the clients in each round, and clients that come and go."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

from fedkd.config import Experiment
from fedkd.runs.directory import RunDirectory
from fedkd.runs.events import ClientsAsked, ClientTrained, ReplyRefused, RoundFinished
from simulations.client_app import make_client_app
from simulations.job import begun, run_job
from simulations.local import LocalGrid, run_local
from tests.conftest import Shared, Tiny
from tests.simulations.faults import crashing

pytestmark = pytest.mark.usefixtures("lean")

FIVE = ("clients=5", "rounds=4", "teachers.epochs=1", "distillation.epochs=1")
DRAWN = (*FIVE, "federation.participation=0.4")


def student(run: RunDirectory) -> str:
    return str(run.read_json("summary.json")["hash"])


def asked(run: RunDirectory) -> list[list[int]]:
    return [sorted(event.asked) for event in run.events(ClientsAsked)]


def answered(run: RunDirectory) -> list[list[int]]:
    return [event.answered for event in run.events(RoundFinished)]


def schedule(cohorts: Iterable[Iterable[int]]) -> str:
    lists = [list(cohort) for cohort in cohorts]
    return f"federation.participation.sampler={{name: schedule, cohorts: {lists}}}"


def trace(there: Mapping[int, str]) -> str:
    return f"federation.participation.sampler={{name: trace, there: {dict(there)}}}"


def test_only_the_cohort_is_asked(shared: Shared) -> None:
    run = shared(*DRAWN)
    assert [len(cohort) for cohort in asked(run)] == [2, 2, 2, 2]
    assert asked(run) == answered(run)
    assert len({tuple(cohort) for cohort in asked(run)}) > 1
    sent = {(m.round, m.client) for m in run.messages() if m.phase != "describe"}
    assert sent == {(n, c) for n, cohort in enumerate(asked(run), 1) for c in cohort}
    assert [event.status for event in run.events(RoundFinished)] == ["ok"] * 4
    assert run.events(ReplyRefused) == []


def test_the_draw_changes_nothing_else(shared: Shared) -> None:
    everybody = shared(*FIVE)
    assert everybody.events(ClientsAsked) == []
    assert student(shared(*FIVE, "federation.participation=1.0")) == student(everybody)
    drawn = shared(*DRAWN)
    assert student(shared(*FIVE, schedule(asked(drawn)))) == student(drawn) != student(everybody)


def test_a_quorum_is_one_of_the_clients_asked(tiny: Tiny) -> None:
    run = run_local(
        tiny(*DRAWN, "rounds=1", "federation.quorum=1"), client_app=crashing(9, "train", 1)
    )
    assert run.events(RoundFinished)[0].status == "ok"
    (cohort,) = asked(run)
    lost = run_local(
        tiny(*DRAWN, "rounds=1", "federation.quorum=0.6"),
        client_app=crashing(cohort[0], "train", 1),
    )
    assert lost.events(RoundFinished)[0].status == "degraded"


def test_a_resumed_run_asks_the_same_clients(tiny: Tiny, shared: Shared) -> None:
    whole = shared(*DRAWN)

    class Stop(Exception):
        pass

    def stop(event: str, **facts: object) -> None:
        if event == "phase" and facts["round"] == 3 and facts["phase"] == "knowledge":
            raise Stop

    run = RunDirectory.new(tiny(*DRAWN))
    with pytest.raises(Stop):
        run_local(run.experiment, run=run, notify=stop)
    resumed = run_local(run.experiment, run=RunDirectory.open(run.path))
    assert (asked(resumed), student(resumed)) == (asked(whole), student(whole))


def test_spares_take_the_place_of_those_that_fail(tiny: Tiny) -> None:
    words = (*FIVE, "rounds=1", "federation.participation={ask: 2, spare: 0.5}")
    plain = run_local(tiny(*words))
    (draw,) = plain.events(ClientsAsked)
    assert (len(draw.asked), draw.wanted) == (3, 2)
    assert answered(plain) == [sorted(draw.asked[:2])]
    assert len(plain.events(ClientTrained)) == 3
    lost = run_local(tiny(*words), client_app=crashing(draw.asked[0], "train", 1))
    assert answered(lost) == [sorted(draw.asked[1:])]


def test_too_few_clients_are_not_asked_at_all(tiny: Tiny) -> None:
    words = (*FIVE, "rounds=2", trace({0: "2", 1: "2", 2: "2"}))
    run = run_local(tiny(*words, "federation.participation.minimum=3"))
    assert (asked(run), answered(run)) == ([[], [0, 1, 2, 3, 4]], [[], [0, 1, 2, 3, 4]])
    assert [event.status for event in run.events(RoundFinished)] == ["degraded", "ok"]
    assert {m.round for m in run.messages() if m.phase != "describe"} == {2}


class Comings(LocalGrid):
    """A federation whose nodes come and go between rounds."""

    def __init__(self, run: RunDirectory, there: Mapping[int, Iterable[int]]) -> None:
        super().__init__(make_client_app(), run.experiment.clients)
        self._run, self._there = run, there

    def get_node_ids(self) -> Iterable[int]:
        number = len(self._run.events(RoundFinished)) + 1
        return [1000 - client for client in self._there[number]]


def elastic(experiment: Experiment, there: Mapping[int, Iterable[int]]) -> RunDirectory:
    run, context = begun(experiment, None, workers=False)
    run_job(Comings(run, there), run, context)
    return run


def test_nodes_come_and_go_as_in_a_trace(tiny: Tiny, shared: Shared) -> None:
    words = (*FIVE, "clients=2 to 5", "teachers.models=[mlp, mlp, mlp, cnn_tiny]")
    there = {1: [0, 1, 2], 2: [0, 1, 2, 3], 3: [0, 3], 4: [0, 2, 3]}
    run = elastic(tiny(*words), there)
    assert asked(run) == answered(run) == list(there.values())
    assert [event.there for event in run.events(ClientsAsked)] == ["0-2", "0-3", "0,3", "0,2-3"]
    simulated = shared(*words, trace({1: "1-2", 2: "1-2, 4-", 3: "2-", 4: ""}))
    assert answered(simulated) == answered(run)
    assert student(simulated) == student(run)
    # Back with the teacher of round 2: its own file is the one that it goes on from.
    files = {path.name for path in Path(run.clients / "client-0002").glob("teacher-*")}
    assert files == {"teacher-0002.pt", "teacher-0004.pt"}
