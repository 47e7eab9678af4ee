"""The job travels whole once to each node, then by its digest."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedkd.privacy.policy import Policy, PolicyRefused
from fedkd.rounds import ExperimentContext
from fedkd.runs.directory import RunDirectory
from fedkd.runs.events import ReplyRefused, RoundFinished
from fedkd.simulations.client_app import make_client_app
from fedkd.simulations.local import LocalGrid, run_local
from fedkd.strategies.records import JOB, MESSAGES_OWN, NAMED, UNKNOWN, job_digest
from tests.conftest import Tiny

pytestmark = pytest.mark.usefixtures("lean")

SMALL = (
    "clients=3", "rounds=2", "teachers.models=[mlp]", "teachers.epochs=1", "student.model=mlp",
    "distillation.epochs=1", "distillation.losses=[kd]", "fusion=[class_gated]",
)  # fmt: skip


def watched(
    monkeypatch: pytest.MonkeyPatch, before: Callable[[Message, Context], None] = lambda m, c: None
) -> Counter[tuple[str, bool]]:
    """Counts of (message type, whole job) of the messages to nodes; `before` sees each first."""
    sent: Counter[tuple[str, bool]] = Counter()
    answer = LocalGrid._answer

    def count(self: LocalGrid, message: Message) -> Message:
        job = message.content.config_records[JOB]
        sent[message.metadata.message_type, NAMED not in job] += 1
        before(message, self._contexts[message.metadata.dst_node_id])
        return answer(self, message)

    monkeypatch.setattr(LocalGrid, "_answer", count)
    return sent


def hashes(run: RunDirectory) -> list[str | None]:
    return [event.hash for event in run.events(RoundFinished)]


def test_the_job_is_sent_once_and_then_named(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = watched(monkeypatch)
    run = run_local(tiny(*SMALL))
    assert {kind for kind, whole in sent if whole} == {"query.describe"}
    assert sent["query.describe", True] == 3
    assert sent["train", False] == 6
    down = {message.phase: message.down for message in run.messages()}
    assert down["train"] < 0.6 * down["describe"]


def test_a_node_started_anew_is_sent_the_job_again(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = hashes(run_local(tiny(*SMALL)))

    def forget(message: Message, context: Context) -> None:
        job = message.content.config_records[JOB]
        second = message.metadata.message_type == "train" and job["round"] == 2
        if second and NAMED in job and context.node_config["partition-id"] == 1:
            context.state = RecordDict()

    sent = watched(monkeypatch, forget)
    run = run_local(tiny(*SMALL))
    assert hashes(run) == undisturbed
    assert not run.events(ReplyRefused)
    assert (sent["train", False], sent["train", True]) == (6, 1)
    counted = [m for m in run.messages() if (m.phase, m.round, m.client) == ("train", 2, 1)]
    assert len(counted) == 2  # both messages cost bytes
    assert counted[0].down < counted[1].down


def test_a_node_that_never_knows_the_job_loses_its_rounds(tiny: Tiny) -> None:
    def mod(message: Message, context: Any, call_next: Any) -> Message:
        reply: Message = call_next(message, context)
        client = context.node_config["partition-id"]
        if client == 1 and message.metadata.message_type == "query.knowledge":
            return Message(RecordDict({UNKNOWN: ConfigRecord()}), reply_to=message)
        return reply

    run = run_local(tiny(*SMALL), client_app=make_client_app([mod]))
    refused = run.events(ReplyRefused)
    assert [(r.client, r.phase, r.round) for r in refused] == [
        (1, "knowledge", 1), (1, "knowledge", 2)
    ]  # fmt: skip
    assert [event.answered for event in run.events(RoundFinished)] == [[0, 2], [0, 2]]


@pytest.fixture
def ask(tmp_path: Path, tiny: Tiny) -> Callable[[dict[str, Any]], RecordDict]:
    """Sends a job to a node that allows the experiment `SMALL`."""
    space = ExperimentContext(tiny(*SMALL))
    policy = Policy.of(space.experiment, space.kinds, space.fusion, space.largest_network)
    (tmp_path / "policy.yaml").write_text(policy.to_yaml())
    config = {
        "partition-id": 0, "num-partitions": 3, "state-dir": str(tmp_path / "state"),
        "policy": str(tmp_path / "policy.yaml"),
    }  # fmt: skip
    context = Context(run_id=1, node_id=5, state=RecordDict(), run_config={}, node_config=config)
    app = make_client_app()
    TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1

    def send(job: dict[str, Any]) -> RecordDict:
        message = Message(
            RecordDict({JOB: ConfigRecord(job)}), dst_node_id=5, message_type="train", ttl=600
        )
        message.metadata.__dict__["_message_id"] = "x"
        return app(message, context).content

    return send


def job_of(tiny: Tiny, *overrides: str) -> dict[str, Any]:
    experiment = tiny(*SMALL, *overrides)
    fingerprint = ExperimentContext(experiment).data.transfer.fingerprint
    return {
        "config": experiment.to_bytes(), "run": "r", "state": "", "fingerprint": fingerprint,
        "round": 1,
    }  # fmt: skip


def test_a_job_by_its_digest_is_checked_as_one_that_is_sent(
    tiny: Tiny, ask: Callable[[dict[str, Any]], RecordDict]
) -> None:
    greedy = job_of(tiny, "teachers.epochs=90")
    with pytest.raises(PolicyRefused) as whole:
        ask(greedy)
    with pytest.raises(PolicyRefused) as named:
        ask({NAMED: job_digest(greedy), "round": 1})
    assert str(named.value) == str(whole.value)


def test_a_named_job_is_the_one_that_was_kept_whatever_lies_beside_it(
    tiny: Tiny, ask: Callable[[dict[str, Any]], RecordDict]
) -> None:
    allowed, greedy = job_of(tiny), job_of(tiny, "teachers.epochs=90")
    assert UNKNOWN in ask({NAMED: job_digest(allowed), "round": 1})
    assert "metrics" in ask(allowed)
    assert UNKNOWN in ask({NAMED: job_digest(greedy), "round": 2})
    assert "metrics" in ask({**greedy, NAMED: job_digest(allowed), "round": 2})
    assert job_digest(allowed) == job_digest({**allowed, **dict.fromkeys(MESSAGES_OWN, 7)})
