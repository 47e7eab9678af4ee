"""Rounds that end when K replies are in: who is late counts in the next one."""

from collections.abc import Iterable

import pytest
from flwr.app import Message

from fedkd.config import ConfigError
from fedkd.rounds import ExperimentContext
from fedkd.runs.directory import RunDirectory
from fedkd.runs.events import ClientTrained, OldAnswersCounted, RoundFinished
from fedkd.studies.unlearning import check_removal
from simulations.client_app import make_client_app
from simulations.job import begun, run_job
from simulations.local import LocalGrid, run_local
from strategies.records import JOB
from tests.conftest import Tiny

pytestmark = pytest.mark.usefixtures("lean")

QUICK = ("teachers={models: [mlp], epochs: 1}", "distillation={losses: [dkd, ce], epochs: 1}")
BUFFERED = ("federation.mode=buffered", "federation.stale.keep=2", "rounds=3", *QUICK)


class LateGrid(LocalGrid):
    """The teacher of client 0's first round is ready when that round has gone on without it."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self.late: set[str] = set()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        sent = list(messages)
        identities = list(super().push_messages(sent))
        for message, identity in zip(sent, identities, strict=True):
            number = message.content.config_records[JOB]["round"]
            trains = message.metadata.message_type == "train"
            if trains and number == 1 and message.metadata.dst_node_id == 1000:
                self.late.add(identity)
            elif not trains and message.metadata.message_type != "query.describe":
                self.late.clear()  # the first round is over
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


def test_a_buffered_run_goes_on_where_it_ended(tiny: Tiny) -> None:
    run = late(tiny)
    (run.path / "checkpoints" / "round-0003.pt").unlink()
    run_local(run.experiment, run=run)
    assert [event.round for event in run.events(RoundFinished)] == [1, 2, 3]
    with pytest.raises(ConfigError, match="buffered"):
        check_removal(run, [0])


def test_what_does_not_fit_is_refused(tiny: Tiny) -> None:
    with pytest.raises(ConfigError, match=r"federation\.stale\.keep=2"):
        ExperimentContext(tiny("federation.mode=buffered"))
    with pytest.raises(ConfigError, match=r"federation\.buffer: needs federation\.mode=buffered"):
        ExperimentContext(tiny("federation.buffer=2"))
