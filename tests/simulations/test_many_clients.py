"""Federations of more clients than messages are ever under way."""

from collections.abc import Callable
from typing import Any

import pytest
from flwr.app import Message

from fedkd.reporting.run_page import write_report
from fedkd.runs import results
from fedkd.runs.directory import RunDirectory
from fedkd.runs.events import ClientTrained, ReplyRefused, RoundFinished
from fedkd.runs.results import listed
from simulations import job
from simulations.cli.status import status_of
from simulations.client_app import make_client_app
from simulations.local import run_local
from strategies.records import JOB
from tests.conftest import Tiny

pytestmark = pytest.mark.usefixtures("lean")

MANY = (
    "rounds=2", "teachers.models=[mlp]", "teachers.epochs=1", "student.model=mlp",
    "distillation.epochs=1", "distillation.losses=[kd]", "fusion=[class_gated]",
    "data.partition={name: inner_dirichlet, alpha: 1.0}", "federation.codec=delta",
    "evaluation.clients=false",
)  # fmt: skip


def outcome(run: RunDirectory) -> list[tuple[str | None, list[int]]]:
    assert not run.events(ReplyRefused)
    return [(event.hash, event.answered) for event in run.events(RoundFinished)]


@pytest.mark.parametrize("asked", ["all", "3"])
def test_clients_that_nodes_play_teach_the_same_student(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    experiment = tiny(*MANY, "clients=7", f"federation.participation={asked}")
    each_a_node = outcome(run_local(experiment))
    monkeypatch.setattr(job, "WINDOW", 3)
    assert outcome(run_local(experiment)) == each_a_node


def test_what_does_not_take_part_costs_nothing(tiny: Tiny) -> None:
    seen: list[tuple[str, int, object]] = []

    def mod(message: Message, context: Any, call_next: Callable[..., Message]) -> Message:
        number = context.node_config["partition-id"]
        seen.append((message.metadata.message_type, number, message.content[JOB].get("members")))
        return call_next(message, context)

    experiment = tiny(*MANY, "clients=150", "federation.participation=4")
    run = run_local(experiment, client_app=make_client_app([mod]))
    trained = [event.client for event in run.events(ClientTrained)]
    assert len(trained) == 8
    assert max(trained) > 64  # some of them are played
    # A mod is told which client it is, as where each has a node of its own.
    assert [number for kind, number, _ in seen if kind == "train"] == trained
    assert all(named == [number] for kind, number, named in seen if kind == "train")
    assert sum(kind == "query.describe" for kind, *_ in seen) == 64
    assert {place.name for place in run.clients.iterdir()} == {f"client-{c:04d}" for c in trained}
    assert not run.events(ReplyRefused)


def test_the_page_of_many_clients_shows_those_that_were_asked_last(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert listed(3, []) == [0, 1, 2]
    assert listed(201, [7, None, 200, 7, 5]) == [5, 7, 200]
    monkeypatch.setattr(results, "LISTED", 5)
    run = run_local(tiny(*MANY, "clients=150", "federation.participation=4"))
    last = [event.client for event in run.events(ClientTrained)][-4:]
    shown = {row["client"] for row in run.read_json("summary.json")["teachers"]}
    assert len(shown) == 5
    assert shown >= set(last)
    page = write_report(run).read_text(encoding="utf-8")
    assert "5 of 150 teachers: those that were asked last" in page
    assert "5 of 150 clients: those that were asked last" in page
    assert set(status_of(run.path).clients) == shown


def test_another_number_of_nodes_is_still_refused(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("strategies.nodes.SETTLE_SECONDS", 0.2)
    with pytest.raises(ValueError, match="the experiment has 70 clients, the federation has 64"):
        run_local(tiny(*MANY, "clients=70"), nodes=64)
