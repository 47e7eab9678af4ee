"""Clients that train together: balanced groups, and in all else what each is alone."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Error, Message

from fedkd.data.images import ImageSet
from fedkd.io.tensors import load_state
from fedkd.models.network import Network
from fedkd.rounds.budget import Budget
from fedkd.runs.directory import RunDirectory
from fedkd.runs.events import ClientTrained, ReplyRefused, RoundFinished
from fedkd.simulations import local
from fedkd.simulations.local import LocalGrid, run_local
from fedkd.strategies.groups import balanced
from fedkd.strategies.records import JOB, MEMBERS
from fedkd.training.batched import fit_many
from fedkd.training.supervised import Fit, fit
from tests.conftest import Shared, Tiny

pytestmark = pytest.mark.usefixtures("lean")

ON = ("clients=6", "resources.batch_clients=on", "teachers.optimizer={name: sgd}")
OFF = ("clients=6", "resources.batch_clients=off", "teachers.optimizer={name: sgd}")


def one_by_one(
    teachers: list[Network],
    shards: list[ImageSet],
    *,
    seeds: list[int],
    pulls: Any,
    together: bool,
    **options: Any,
) -> list[Fit | Exception]:
    each = zip(teachers, shards, seeds, pulls, strict=True)
    return [fit(who, shard, seed=seed, pull=pull, **options) for who, shard, seed, pull in each]


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Members of a group are trained one after the other."""
    monkeypatch.setattr("fedkd.rounds.client.fit_many", one_by_one)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The groups that were asked to train, as they were asked."""
    found: list[list[int]] = []
    push = LocalGrid.push_messages

    def watched(self: LocalGrid, messages: Iterable[Message]) -> Iterable[str]:
        messages = list(messages)
        for message in messages:
            if message.metadata.message_type == "train":
                found.append(message.content.config_records[JOB].get(MEMBERS, []))  # type: ignore[arg-type]
        return push(self, messages)

    monkeypatch.setattr(LocalGrid, "push_messages", watched)
    return found


def with_workers(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(local, "run_job", partial(local.run_job, workers=lambda: count))


def student(run: RunDirectory) -> str:
    return str(run.read_json("summary.json")["hash"])


def teacher(run: RunDirectory, client: int, round_number: int) -> torch.Tensor:
    state = load_state(run.clients / f"client-{client:04d}" / f"teacher-{round_number:04d}.pt")
    return torch.cat([part.flatten().float() for part in state["weights"].values()])


def test_groups_are_of_one_architecture_and_of_much_the_same_cost() -> None:
    costs = {0: 9, 1: 4, 2: 5, 3: 4, 4: 1, 5: 1}
    grouped = partial(balanced, range(6), lambda client: client % 2, costs.get)
    assert grouped(workers=1) == [[0, 2, 4], [1, 3, 5]]
    assert grouped(workers=3) == [[0], [2, 4], [1, 5], [3]]
    assert grouped(workers=50) == [[0], [2], [1], [3], [4], [5]]
    assert balanced([3, 1], lambda _: "same", lambda _: 0, 2) == [[1], [3]]
    assert balanced([], lambda _: "same", lambda _: 0, 2) == []


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.usefixtures("alone")
def test_however_many_workers_the_student_is_the_one_of_clients_alone(
    workers: int,
    tiny: Tiny,
    shared: Shared,
    monkeypatch: pytest.MonkeyPatch,
    asked: list[list[int]],
) -> None:
    whole = shared(*OFF)
    asked.clear()
    with_workers(monkeypatch, workers)
    run = run_local(tiny(*ON))
    assert student(run) == student(whole)
    assert any(asked)
    both = [[(m.round, m.phase, m.client) for m in each.messages()] for each in (run, whole)]
    assert sorted(both[0], key=str) == sorted(both[1], key=str)


def test_a_batch_of_clients_trains_each_as_alone_but_for_rounding(
    tiny: Tiny, shared: Shared
) -> None:
    together, whole = run_local(tiny(*ON, "rounds=1")), shared(*OFF, "rounds=1")
    for client in range(6):
        assert torch.allclose(teacher(together, client, 1), teacher(whole, client, 1), atol=1e-4)
    for ours, theirs in zip(together.events(ClientTrained), whole.events(ClientTrained)):
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-3) or ours.client != theirs.client


def test_a_failure_in_a_group_is_its_clients_alone(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = Budget.images

    def failing(self: Budget) -> ImageSet:
        if self._number == 2:
            raise OSError("the disk is full")
        return images(self)

    monkeypatch.setattr(Budget, "images", failing)
    run = run_local(tiny(*ON, "rounds=1"))
    (refused,) = run.events(ReplyRefused)
    assert (refused.client, refused.phase) == (2, "train")
    assert refused.reason == "OSError: the disk is full (code 2)"
    assert run.events(RoundFinished)[0].answered == [0, 1, 3, 4, 5]


def test_a_group_whose_worker_died_is_asked_again(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, shared: Shared, asked: list[list[int]]
) -> None:
    answer, died = LocalGrid._answer, []

    def dying(self: LocalGrid, message: Message) -> Message:
        if message.metadata.message_type == "train" and not died:
            died.append(message)
            return Message(Error(0, "ActorDiedError"), reply_to=message)
        return answer(self, message)

    monkeypatch.setattr(LocalGrid, "_answer", dying)
    run = run_local(tiny(*ON, "rounds=1"))
    assert asked == [[0, 2, 4], [1, 3, 5], [0, 2, 4]]
    assert run.events(RoundFinished)[0].answered == [0, 1, 2, 3, 4, 5]
    assert not run.events(ReplyRefused)


def test_members_that_have_trained_before_a_restart_are_not_trained_again(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stop(Exception):
        pass

    def stop(event: str, **facts: object) -> None:
        if event == "phase" and facts["phase"] == "knowledge":
            raise Stop

    run = RunDirectory.new(tiny(*ON, "rounds=1"))
    with pytest.raises(Stop):
        run_local(run.experiment, run=run, notify=stop)
    (run.clients / "client-0004" / "teacher-0001.pt").unlink()
    before = {client: teacher(run, client, 1) for client in (0, 1, 2, 3, 5)}
    trained: list[int] = []

    def counted(teachers: list[Network], *args: Any, **options: Any) -> list[Fit | Exception]:
        trained.append(len(teachers))
        return fit_many(teachers, *args, **options)

    monkeypatch.setattr("fedkd.rounds.client.fit_many", counted)
    run_local(run.experiment, run=run)
    assert sum(trained) == 1
    assert all(torch.equal(teacher(run, client, 1), old) for client, old in before.items())


def test_private_training_in_groups_books_every_client(tiny: Tiny) -> None:
    private = (
        "teachers.privacy={epsilon: 8, nominal_size: 40, accountant: rdp}",
        "teachers.models=[mlp]",
        "distillation.losses=[ce]",
    )
    run = run_local(tiny("clients=3", "resources.batch_clients=on", "fusion=[uniform]", *private))
    spent = {event.client: event.epsilon for event in run.events(ClientTrained) if event.round == 2}
    assert sorted(spent) == [0, 1, 2]
    assert all(0 < epsilon <= 8 for epsilon in spent.values() if epsilon)


def test_a_real_node_trains_for_itself_alone(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FEDKD_STATE", str(tmp_path / "state"))
    monkeypatch.setattr("fedkd.simulations.client_app._policy", lambda node: None)
    run = run_local(tiny(*ON, "rounds=1", "federation.quorum=0"))
    reasons = {event.reason for event in run.events(ReplyRefused) if event.phase == "train"}
    assert len(reasons) == 1
    assert "a node trains for itself alone" in reasons.pop()
