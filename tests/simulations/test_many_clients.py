"""Federations of more clients than messages are ever under way."""

from collections.abc import Callable
from typing import Any

import pytest
from flwr.app import Message

from fedkd.reporting.run_page import write_report
from fedkd.runs import results
from fedkd.runs.directory import RunDirectory
from fedkd.runs.events import ClientTrained, ReplyRefused, RoundFinished, Warned
from fedkd.runs.results import listed
from fedkd.simulations import job
from fedkd.simulations.cli.status import status_of
from fedkd.simulations.client_app import make_client_app
from fedkd.simulations.local import run_local
from fedkd.strategies.records import JOB
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
    # A mod sees which client it is, as where each has a node of its own.
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
    monkeypatch.setattr("fedkd.strategies.nodes.SETTLE_SECONDS", 0.2)
    with pytest.raises(ValueError, match="the experiment has 70 clients, the federation has 64"):
        run_local(tiny(*MANY, "clients=70"), nodes=64)


TURNS = (
    *MANY, "clients=4", "rounds=4",
    "federation.participation={sampler: {name: schedule, cohorts: [[0, 1], [2], [3], [0, 2]]}}",
)  # fmt: skip


def teachers(run: RunDirectory) -> dict[str, list[str]]:
    return {
        place.name: sorted(path.stem for path in place.glob("teacher-*"))
        for place in sorted(run.clients.iterdir())
    }


def about_teachers(run: RunDirectory) -> set[str]:
    return {event.text for event in run.events(Warned) if event.text.startswith("teachers take")}


def test_teachers_of_those_asked_longest_ago_make_room(tiny: Tiny) -> None:
    whole = run_local(tiny(*TURNS))
    assert not about_teachers(whole)
    sizes = [path.stat().st_size for path in whole.clients.rglob("*-000?.*")]
    limit = (sum(sizes) - max(sizes) / 2) / 1e9  # of all rounds' files, some must go
    run = run_local(tiny(*TURNS, f"resources.teachers_gb={limit}"))
    assert teachers(run) == {**teachers(whole), "client-0001": []}
    (warning,) = about_teachers(run)
    assert "those of clients asked longest ago are removed" in warning
    assert outcome(run) == outcome(whole)  # nobody was asked again who had lost anything


def test_a_teacher_that_was_removed_is_trained_anew_and_a_resumed_run_does_the_same(
    tiny: Tiny,
) -> None:
    least = tiny(*TURNS, "resources.teachers_gb=1e-9")
    run = run_local(least)
    assert outcome(run) != outcome(run_local(tiny(*TURNS)))
    assert teachers(run)["client-0000"] == ["teacher-0004"]

    def stop(event: str, **facts: Any) -> None:
        if event == "reply" and facts["round"] == 4 and facts["phase"] == "train":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_local(least, notify=stop)
    (stopped,) = [
        path for path in run.path.parent.iterdir() if not (path / "summary.json").is_file()
    ]
    resumed = RunDirectory.open(stopped)
    run_local(resumed.experiment, run=resumed)
    assert outcome(resumed) == outcome(run)
    assert teachers(resumed) == teachers(run)


def test_teachers_that_privacy_was_paid_for_stay(tiny: Tiny) -> None:
    private = (
        "teachers.privacy={epsilon: 8.0, nominal_size: 40, accountant: rdp}", "fusion=[uniform]",
        "evaluation.clients=false", "federation.codec=float16", "resources.teachers_gb=1e-9",
        "clients=2", "rounds=2",
        "federation.participation={sampler: {name: schedule, cohorts: [[0], [1]]}}",
    )  # fmt: skip
    run = run_local(tiny(*MANY, *private))
    assert [len(names) for names in teachers(run).values()] == [1, 1]
