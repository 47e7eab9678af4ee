"""A part of the clients in each round, and clients that come and go."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from flwr.app import Message

from fedkd.config import ConfigError, Experiment
from fedkd.rounds import ExperimentContext, Server
from fedkd.runs.directory import RunDirectory
from fedkd.runs.events import ClientsAsked, ClientTrained, ReplyRefused, RoundFinished
from fedkd.simulations.client_app import make_client_app
from fedkd.simulations.job import begun, run_job
from fedkd.simulations.local import LocalGrid, run_local
from fedkd.strategies.exchange import DESCRIBE
from fedkd.strategies.records import JOB
from fedkd.strategies.strategy import FederatedDistillation
from fedkd.studies.contribution import contribution
from fedkd.studies.unlearning import distil_again, finished_rounds, prepare
from tests.conftest import Shared, Tiny
from tests.simulations.faults import BAD_PAYLOADS, crashing, tampering

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
        self.jobs: list[dict[str, object]] = []  # of those that were asked who they are

    def _answer(self, message: Message) -> Message:
        if message.metadata.message_type == DESCRIBE.message_type:
            self.jobs.append(dict(message.content.config_records[JOB]))
        return super()._answer(message)

    def get_node_ids(self) -> Iterable[int]:
        number = len(self._run.events(RoundFinished)) + 1
        return [1000 - client for client in self._there[number]]


def elastic(experiment: Experiment, there: Mapping[int, Iterable[int]]) -> RunDirectory:
    run, context = begun(experiment, None, workers=False)
    grid = Comings(run, there)
    run_job(grid, run, context)
    # One that returns was started anew, and keeps nothing by which the job could be named.
    assert all("config" in job for job in grid.jobs)
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


@pytest.mark.parametrize(
    "words",
    ["federation.codec={name: delta, inner: float16, tolerance: 1}", "federation.subset=0.5"],
    ids=["delta", "subset"],
)
def test_an_answer_may_refer_to_one_from_before_an_absence(tiny: Tiny, words: str) -> None:
    """Client 0 sends changes of an answer four rounds old; client 1 was never asked."""
    cohorts = [[0, 2], [2], [2], [2], [0, 1, 2]]
    more = ("rounds=5", "clients=3", "data.views.refresh=false", words)
    run = run_local(tiny(*FIVE, schedule(cohorts), *more))
    assert run.events(ReplyRefused) == []
    assert answered(run) == cohorts
    up = {(m.round, m.client): m.up for m in run.messages() if m.phase == "knowledge"}
    assert up[5, 0] < up[5, 1]


def test_clients_that_were_away_can_be_valued_and_taken_out(shared: Shared, tiny: Tiny) -> None:
    words = (*FIVE, "rounds=3", "federation.quorum=1", "federation.participation.minimum=2")
    drawn = trace({0: "1, 3", 1: "1", 2: "1", 3: "3", 4: ""})
    run = shared(*words, drawn)
    assert answered(run) == [[0, 1, 2], [], [0, 3]]
    assert finished_rounds(run) == [1, 3]
    context = ExperimentContext(run.experiment)
    facts = contribution(run, context, all_rounds=True)
    assert sorted(facts["clients"]) == [0, 1, 2, 3]
    new = prepare(run, [1])
    server = distil_again(new, context)
    assert [event.answered for event in new.events(RoundFinished)] == [[0, 2], [0, 3]]
    # A quorum of the three that were asked is not two; without one the student stays as it is.
    assert [event.status for event in new.events(RoundFinished)] == ["degraded", "ok"]
    assert server.round == 3


def test_who_is_in_quarantine_is_passed_over(tiny: Tiny) -> None:
    strike, _ = BAD_PAYLOADS["nan"]
    run = run_local(
        tiny(*FIVE, "federation.participation=4", "federation.quarantine.after=1"),
        client_app=tampering({2: strike}),
    )
    first = next(event.round for event in run.events(ClientsAsked) if 2 in event.asked)
    later = [event for event in run.events(ClientsAsked) if event.round > first]
    assert later
    assert all(2 not in event.asked and len(event.asked) == 4 for event in later)


def test_a_range_of_nodes(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedkd.strategies.nodes.SETTLE_SECONDS", 0.2)
    short = ("rounds=1", "clients=2 to 3")
    with pytest.raises(ConfigError, match="needs 2 clients to start, of 1 nodes in the federation"):
        run_local(tiny(*short), nodes=1)
    assert answered(run_local(tiny(*short), nodes=2)) == [[0, 1]]
    more = run_local(tiny(*short), nodes=5)
    assert answered(more) == [[0, 1, 2]]
    reasons = [event.reason for event in more.events(ReplyRefused)]
    assert [f"claims to be client {c}, clients are 0 to 2" in r for c, r in zip((4, 3), reasons)]


def test_a_node_that_returns_under_another_id_waits_for_the_old_one_to_go(tiny: Tiny) -> None:
    experiment = tiny(*FIVE, "rounds=3", "clients=2 to 5")
    run, context = begun(experiment, None, workers=False)
    grid = Comings(run, {1: [0, 1, 2], 2: [0, 1, 2, -1], 3: [0, 1, -1]})
    grid._contexts[1001] = replace(grid._contexts[998], node_id=1001)  # client 2 again
    run_job(grid, run, context)
    assert answered(run) == [[0, 1, 2]] * 3
    (refused,) = run.events(ReplyRefused)
    assert "node 1001 claims to be client 2, as node 998 does" in refused.reason


def test_real_nodes_are_not_waited_for_once_enough_have_trained(tiny: Tiny) -> None:
    experiment = tiny(*FIVE, "rounds=1", "federation.participation={ask: 2, spare: 0.5}")
    run, context = begun(experiment, None, workers=False)
    server = Server(context, run)
    run.clients.mkdir()
    driver = FederatedDistillation(
        LocalGrid(make_client_app(), 5), server, state_dir=str(run.clients)
    )
    driver.exchange.simulated = False  # of which the quickest count, not the first of the draw
    driver.run()
    (cohort,) = run.events(ClientsAsked)
    assert answered(run) == [sorted(cohort.asked)[:2]]


def test_a_resumed_run_goes_on_with_those_that_are_left(tiny: Tiny) -> None:
    run, context = begun(tiny(*FIVE, "rounds=2", "clients=3 to 5"), None, workers=False)

    def stop(event: str, **facts: object) -> None:
        if event == "round":
            raise InterruptedError

    there = {1: [0, 1, 2, 3], 2: [3]}
    with pytest.raises(InterruptedError):
        run_job(Comings(run, there), run, context, notify=stop)
    run_job(Comings(run, there), run, context)
    assert answered(run) == [[0, 1, 2, 3], [3]]
