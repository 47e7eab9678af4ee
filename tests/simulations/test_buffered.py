"""Rounds that end when K replies are in: who is late counts in the next one."""

import json
import time
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedkd.config import ConfigError
from fedkd.rounds import ExperimentContext, Interrupted
from fedkd.runs.directory import RunDirectory
from fedkd.runs.events import ClientTrained, OldAnswersCounted, ReplyRefused, RoundFinished
from fedkd.simulations import job
from fedkd.simulations.client_app import make_client_app
from fedkd.simulations.job import begun, run_job
from fedkd.simulations.local import LocalGrid, run_local
from fedkd.simulations.ray import run_ray
from fedkd.strategies.records import JOB
from fedkd.studies.unlearning import check_removal
from tests.conftest import Tiny

pytestmark = pytest.mark.usefixtures("lean")

QUICK = ("teachers={models: [mlp], epochs: 1}", "distillation={losses: [dkd, ce], epochs: 1}")
MANY = ("data.partition={name: inner_dirichlet, alpha: 1.0}", "student.model=mlp")
BUFFERED = ("federation.mode=buffered", "federation.stale.keep=2", "rounds=3", *QUICK)


class LateGrid(LocalGrid):
    """The teacher of client 0's first round is ready when round `until` has gone on without it."""

    until = 1

    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self.late: set[str] = set()
        self.bases: list[tuple[int, object, object]] = []

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        sent = list(messages)
        identities = list(super().push_messages(sent))
        for message, identity in zip(sent, identities, strict=True):
            number = message.content.config_records[JOB]["round"]
            trains = message.metadata.message_type == "train"
            if trains and number == 1 and message.metadata.dst_node_id == 1000:
                self.late.add(identity)
            elif message.metadata.message_type == "query.knowledge":
                facts = message.content.config_records[JOB]
                self.bases.append((message.metadata.dst_node_id, number, facts.get("base", 0)))
                if number == self.until:
                    self.late.clear()
        return identities

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return super().pull_messages([each for each in message_ids if each not in self.late])


def hashes(run: RunDirectory) -> list[str | None]:
    return [event.hash for event in run.events(RoundFinished)]


def late(tiny: Tiny, *more: str) -> RunDirectory:
    run, context = begun(tiny(*BUFFERED, "federation.buffer=2", *more), None, workers=False)
    run_job(LateGrid(make_client_app(), 3), run, context)
    return run


def test_with_all_that_are_asked_it_is_the_synchronous_run(tiny: Tiny) -> None:
    synchronous = run_local(tiny(*BUFFERED[1:]))
    for buffer in ("null", "3"):
        assert hashes(run_local(tiny(*BUFFERED, f"federation.buffer={buffer}"))) == hashes(
            synchronous
        )


def test_a_late_reply_counts_in_the_next_round_by_its_age(tiny: Tiny) -> None:
    run = late(tiny)
    rounds = run.events(RoundFinished)
    assert [event.status for event in rounds] == ["ok", "ok", "ok"]
    assert (rounds[0].answered, rounds[1].answered[0]) == ([1, 2], 1)
    assert len(rounds[1].answered) == 1  # the late one and another are the two that end it
    old = {event.round: event.clients for event in run.events(OldAnswersCounted)}
    assert old[2][0] == 1
    assert run.knowledge(1).clients() == [0, 1, 2]
    trained = [(event.round, event.client) for event in run.events(ClientTrained)]
    assert trained.index((1, 0)) > trained.index((1, 2))
    assert len(set(trained)) == len(trained)


class TwiceAsked(LocalGrid):
    """Counts the training messages that a client has at once."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self.training: dict[str, int] = {}
        self.most = 0
        self.bases: list[tuple[int, int]] = []  # last round asked about, base
        self._last: dict[int, int] = {}

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        sent = list(messages)
        identities = list(super().push_messages(sent))
        for message, identity in zip(sent, identities, strict=True):
            if message.metadata.message_type == "train":
                self.training[identity] = message.metadata.dst_node_id
            if message.metadata.message_type == "query.knowledge":
                facts, node = message.content.config_records[JOB], message.metadata.dst_node_id
                self.bases.append((self._last.get(node, 0), int(facts.get("base", 0))))
                self._last[node] = int(facts["round"])
        counts = Counter(self.training.values())
        self.most = max([self.most, *counts.values()])
        return identities

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        found = list(super().pull_messages(message_ids))
        for message in found:
            self.training.pop(message.metadata.reply_to_message_id, None)
        return found


@pytest.mark.parametrize(
    "word",
    [
        "federation.codec=float16",
        "federation.codec=delta",
        "resources.batch_clients=on",
        "resources.teachers_gb=1e-9",
    ],
)
def test_nobody_is_asked_while_it_trains_though_late_replies_end_a_round(
    tiny: Tiny, word: str
) -> None:
    more = ("federation.buffer=1", "clients=4", "rounds=6", "federation.stale.keep=2")
    run, context = begun(tiny(*BUFFERED, *more, word), None, workers=False)
    grid = TwiceAsked(make_client_app(), 4)
    run_job(grid, run, context)
    assert grid.most == 1
    # A change is one of the client's last answer, if that was late too.
    bases = [base for _, base in grid.bases]
    assert bases == [last if "delta" in word else 0 for last, _ in grid.bases]
    assert any(bases) == ("delta" in word)
    assert {event.status for event in run.events(RoundFinished)} == {"ok"}
    trained = [(event.round, event.client) for event in run.events(ClientTrained)]
    assert len(set(trained)) == len(trained)
    # The fourth of the first round is ready in round 4, when its answer would be too old.
    (refused,) = run.events(ReplyRefused)
    assert refused.round == 1
    assert "ready in round 4; federation.stale.keep=2 lets no answer count" in refused.reason


def test_changes_are_of_an_answer_that_came_two_rounds_late(tiny: Tiny) -> None:
    words = ("federation.buffer=2", "federation.codec=delta", "rounds=5", "federation.stale.keep=3")
    run, context = begun(tiny(*BUFFERED, *words), None, workers=False)
    grid = LateGrid(make_client_app(), 3)
    grid.until = 2
    run_job(grid, run, context)
    mine = [(number, base) for node, number, base in grid.bases if node == 1000]
    assert mine[0] == (1, 0)
    assert mine[1][1] == 1
    assert not run.events(ReplyRefused)


def test_clients_that_nodes_play_are_late_as_those_with_a_node_each(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("federation.buffer=2", "clients=7", "federation.participation=4", *MANY)
    each_a_node = run_local(tiny(*BUFFERED, *words))
    monkeypatch.setattr(job, "WINDOW", 3)
    played = run_local(tiny(*BUFFERED, *words))
    assert hashes(played) == hashes(each_a_node)
    assert played.events(OldAnswersCounted) == each_a_node.events(OldAnswersCounted) != []
    assert not played.events(ReplyRefused)


def noting(place: Path) -> ClientApp:
    """The real client app that notes when which client trained for which round."""
    path = str(place)

    def mod(message: Message, context: Context, call_next: Any) -> Message:
        if message.metadata.message_type != "train":
            return call_next(message, context)  # type: ignore[no-any-return]
        start = time.time()
        reply: Message = call_next(message, context)
        facts = [context.node_config["partition-id"], start, time.time()]
        with Path(path).open("a") as file:
            file.write(json.dumps(facts) + "\n")
        return reply

    return make_client_app([mod])


@pytest.mark.slow
def test_on_ray_late_clients_count_and_the_run_ends(tiny: Tiny, tmp_path: Path) -> None:
    place = tmp_path / "notes"
    words = ("clients=6", "federation.buffer=3", "rounds=4")
    run = run_ray(tiny(*BUFFERED, *words), client_app=noting(place))
    rounds = run.events(RoundFinished)
    assert [event.status for event in rounds] == ["ok"] * 4
    assert not run.events(ReplyRefused)
    trained = [(event.round, event.client) for event in run.events(ClientTrained)]
    assert len(trained) == len(set(trained)) == 12  # three end each round
    for number in range(1, 5):  # whoever trained, late or not, has answered for its round
        answered = run.knowledge(number).clients()
        assert answered == sorted(client for each, client in trained if each == number)
    assert sum(len(event.answered) for event in rounds) < 12
    at_work = sorted(json.loads(line) for line in place.read_text().splitlines())
    for (one, _, ended), (other, start, _) in pairwise(at_work):
        assert one != other or start >= ended


def test_a_buffered_run_goes_on_where_it_ended(tiny: Tiny) -> None:
    def ends(event: str, **facts: Any) -> None:
        if event == "round_start" and facts["round"] == 2:
            raise Interrupted

    run, context = begun(tiny(*BUFFERED, "federation.buffer=2"), None, workers=False)
    with pytest.raises(Interrupted):
        run_job(LateGrid(make_client_app(), 3), run, context, notify=ends)
    assert run.knowledge(1).clients() == [1, 2]  # client 0 is still at work
    run_local(run.experiment, run=run)
    finished = [(event.round, event.status) for event in run.events(RoundFinished)]
    assert finished == [(1, "ok"), (2, "ok"), (3, "ok")]
    with pytest.raises(ConfigError, match="buffered"):
        check_removal(run, [0])


def test_what_does_not_fit_is_refused(tiny: Tiny) -> None:
    with pytest.raises(ConfigError, match=r"federation\.stale\.keep=2"):
        ExperimentContext(tiny("federation.mode=buffered"))
    with pytest.raises(ConfigError, match=r"federation\.buffer: needs federation\.mode=buffered"):
        ExperimentContext(tiny("federation.buffer=2"))
    with pytest.raises(ConfigError, match=r"ends with 1 replies never has .*minimum=2"):
        tiny(*BUFFERED, "federation.buffer=1", "federation.participation.minimum=2")
