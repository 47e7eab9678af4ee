"""Replies of every message type, mutated: none ends the run, none puts a wrong number into it.

`FEDKD_FUZZ=20000 pytest tests/strategies/test_hostile_replies.py` tries as many mutations.
"""

import math
import os
import random
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ConfigRecord, Error, Message, MetricRecord
from flwr.clientapp import ClientApp

from fedkd.io.text import REASON
from fedkd.knowledge.query import Images
from fedkd.rounds import Server, experiment_context
from fedkd.runs.directory import RunDirectory
from fedkd.runs.events import ClientEvaluated, ClientTrained, ReplyRefused, RoundFinished
from fedkd.simulations.client_app import make_client_app
from fedkd.simulations.local import LocalGrid, run_local
from fedkd.strategies.messaging import Delivery
from fedkd.strategies.nodes import Nodes
from fedkd.strategies.records import ENVELOPE, METRICS, arrays_name, header_name
from fedkd.strategies.strategy import FederatedDistillation
from tests.conftest import Tiny
from tests.strategies.mutations import CODES, REASONS, mutated

pytestmark = pytest.mark.usefixtures("lean")


SMALL = (
    "clients=3", "rounds=1", "teachers.models=[mlp]", "teachers.epochs=1", "student.model=mlp",
    "distillation.epochs=1", "distillation.losses=[kd]", "fusion=[class_gated]",
)  # fmt: skip
PRIVATE = (
    "teachers.privacy={epsilon: 8.0, nominal_size: 40, accountant: rdp}", "fusion=[uniform]",
    "evaluation.clients=false", "evaluation.teachers=true",
)  # fmt: skip


def changing(client: int, kind: str, change: Callable[[Message], None]) -> ClientApp:
    """The real client app, with one client's replies of one type changed."""

    def mod(message: Message, context: Any, call_next: Any) -> Message:
        reply: Message = call_next(message, context)
        if message.metadata.message_type == kind and context.node_config["partition-id"] == client:
            change(reply)
        return reply

    return make_client_app([mod])


def with_numbers(**numbers: Any) -> Callable[[Message], None]:
    def change(reply: Message) -> None:
        reply.content[METRICS] = MetricRecord(numbers)

    return change


@pytest.mark.parametrize("name", ["round", "client", "seconds", "event", "self", "phase"])
def test_a_number_of_any_name_costs_its_sender_the_round(tiny: Tiny, name: str) -> None:
    app = changing(0, "train", with_numbers(**{name: 1}))
    run = run_local(tiny(*SMALL), client_app=app)
    (refused,) = run.events(ReplyRefused)
    assert (refused.client, refused.phase) == (0, "train")
    assert f"a number called '{name}'; expected accuracy, loss" in refused.reason
    assert [event.client for event in run.events(ClientTrained)] == [1, 2]
    assert run.events(RoundFinished)[-1].status == "ok"


@pytest.mark.parametrize(
    ("numbers", "reason"),
    [
        ({"holdout_total": 5}, "no number called 'holdout_right'"),
        ({"holdout_total": math.inf, "holdout_right": 1}, "holdout_total: expected a whole number"),
        ({"holdout_total": 1, "holdout_right": -1}, "holdout_right: a whole number from 0"),
        ({"holdout_total": 1, "holdout_right": 2}, "holdout_right: more than holdout_total"),
        ({"holdout_total": 1, "holdout_right": 1, "round": 2}, "a number called 'round'"),
        # What a private client claims to have spent.
        ({"epsilon": 1.0}, "no number called 'trained'"),
        ({"epsilon": -7.0, "trained": 1.0}, "epsilon: a number from 0"),
        ({"epsilon": math.nan, "trained": 1.0}, "epsilon: a number from 0"),
        ({"epsilon": 1.0, "trained": 1.0, "loss": 0.5}, "a number called 'loss'"),
    ],
)
def test_verdicts_and_what_was_spent_are_checked(
    tiny: Tiny, numbers: dict[str, Any], reason: str
) -> None:
    private = "epsilon" in numbers
    app = changing(0, "train" if private else "evaluate", with_numbers(**numbers))
    run = run_local(tiny(*SMALL, *(PRIVATE if private else ())), client_app=app)
    assert reason in run.events(ReplyRefused)[0].reason
    if private:
        assert set(run.read_json("privacy.json")["clients"]) == {"0", "1", "2"}
    else:
        assert {event.client for event in run.events(ClientEvaluated)} == {1, 2}


@pytest.mark.parametrize("client", [True, -1, 3, 2**62, 0.0, "0"])
def test_who_claims_to_be_no_client_leaves_a_run_that_can_be_read(tiny: Tiny, client: Any) -> None:
    def change(reply: Message) -> None:
        reply.content["describe"]["client"] = client

    run = run_local(tiny(*SMALL), client_app=changing(0, "query.describe", change))
    (refused,) = run.events(ReplyRefused)
    assert (refused.phase, refused.client) == ("describe", None)
    assert f"claims to be client {client!r}" in refused.reason
    assert run.events(RoundFinished)[-1].status == "ok"


@pytest.mark.parametrize("key", ["num_examples", "class_counts"])
def test_true_is_no_number_of_images(tiny: Tiny, key: str) -> None:
    def change(reply: Message) -> None:
        header = reply.content[header_name(Images.TRANSFER)]
        old = header[key]
        header[key] = [True] * len(old) if isinstance(old, list) else True

    overrides = (*SMALL, "fusion=[class_gated, sample_count]")
    run = run_local(tiny(*overrides), client_app=changing(0, "query.knowledge", change))
    (refused,) = run.events(ReplyRefused)
    assert (refused.client, refused.reason[: len(key)]) == (0, key)


def test_long_replies_are_refused_and_reasons_are_short(tiny: Tiny) -> None:
    """A megabyte of header, a megabyte of error text and a megabyte of training numbers."""
    long = "x" * (2 * ENVELOPE)

    def header(reply: Message) -> None:
        reply.content[header_name(Images.TRANSFER)]["run"] = long

    def numbers(reply: Message) -> None:
        reply.content["more"] = ConfigRecord({"text": long})

    def broken(reply: Message) -> None:
        raise RuntimeError("\x1b]0;pwn\x07\x1b[2J" + long)

    for kind, change in (("query.knowledge", header), ("train", numbers), ("train", broken)):
        run = run_local(tiny(*SMALL), client_app=changing(1, kind, change))
        (refused,) = run.events(ReplyRefused)
        assert len(refused.reason) <= REASON + 20
        assert "\x1b" not in (run.path / "metrics.jsonl").read_text()
        assert (run.path / "metrics.jsonl").stat().st_size < 100_000
        assert run.events(RoundFinished)[-1].status == "ok"


def test_what_a_client_app_raises_is_not_taken_for_a_dead_worker(tiny: Tiny) -> None:
    """If it were, clients that all claim so would end the run."""

    def mod(message: Message, context: Any, call_next: Any) -> Message:
        if message.metadata.message_type == "evaluate":
            raise RuntimeError("ray.exceptions.ActorDiedError: The actor died unexpectedly")
        return call_next(message, context)

    run = run_local(tiny(*SMALL), client_app=make_client_app([mod]))
    assert run.events(RoundFinished)[-1].status == "ok"
    assert len(run.events(ReplyRefused)) == 3


@pytest.mark.parametrize("kind", ["query.knowledge", "evaluate"])
@pytest.mark.parametrize(
    "fusion", ["[density_ratio]", "[consensus, dawid_skene]", "[history]", "[class_gated]"]
)
def test_who_answers_about_one_set_of_images_only_is_left_out_of_the_other(
    tiny: Tiny, kind: str, fusion: str
) -> None:
    """Rules are fitted to teachers in their order: the ensemble on the test images is of those
    who answered both, each with its own weight."""

    def no_number(reply: Message) -> None:
        about = Images.TRANSFER if kind == "query.knowledge" else Images.TEST
        arrays = reply.content[arrays_name(about)]
        arrays["logits"] = Array(np.full_like(arrays["logits"].numpy(), np.nan))

    overrides = (*SMALL, f"fusion={fusion}", "rounds=2")
    run = run_local(tiny(*overrides), client_app=changing(0, kind, no_number))
    found = [str(record.ensemble) for record in run.events(RoundFinished)]
    assert len(run.events(ReplyRefused)) == 2
    if kind == "query.knowledge":  # as if the client were not there at all
        absent = run_local(tiny(*overrides), client_app=make_client_app([_silent(0)]))
        assert found == [str(record.ensemble) for record in absent.events(RoundFinished)]
    else:
        assert all(len(record.teachers) == 2 for record in run.events(RoundFinished))


def _silent(client: int) -> Any:
    def mod(message: Message, context: Any, call_next: Any) -> Message:
        if context.node_config["partition-id"] == client and message.metadata.message_type in (
            "query.knowledge", "evaluate",
        ):  # fmt: skip
            raise OSError("away")
        return call_next(message, context)

    return mod


# -- mutations of everything -----------------------------------------------------------------------


class Recorded(LocalGrid):
    """A grid that keeps every request with its honest reply."""

    def __init__(self, nodes: int) -> None:
        super().__init__(make_client_app(), nodes)
        self.kept: list[tuple[Message, Message]] = []

    def _answer(self, message: Message) -> Message:
        reply = super()._answer(message)
        self.kept.append((message, reply))
        return reply


def _mutants(
    kept: list[tuple[Message, Message]], kind: str, count: int, seed: int
) -> Iterable[Delivery]:
    draw = random.Random(f"{kind}{seed}")
    honest = [(q, a) for q, a in kept if q.metadata.message_type == kind]
    for number in range(count):
        question, answer = draw.choice(honest)
        if draw.random() < 0.1:
            reply = Message(Error(draw.choice(CODES), draw.choice(REASONS)), reply_to=question)
        else:
            reply = Message(mutated(answer.content, draw), reply_to=question)
        client = 1000 - question.metadata.dst_node_id
        yield Delivery(client if kind != "query.describe" else number, reply, 0.1)


def test_no_reply_ends_the_run(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    each = int(os.environ.get("FEDKD_FUZZ", 320)) // 8
    seen = 0
    for overrides in ((), PRIVATE):
        experiment = tiny(*SMALL, *overrides)
        grid = Recorded(experiment.clients)
        run = RunDirectory.new(experiment)
        server = Server(experiment_context(experiment), run)
        driver = FederatedDistillation(grid, server, state_dir=str(run.clients))
        run.clients.mkdir(exist_ok=True)
        driver.run()
        before = len(run.events(ReplyRefused))
        ask = {
            "train": driver.train, "query.knowledge": driver.answer, "evaluate": driver.evaluate,
        }  # fmt: skip
        for kind in ("query.describe", *ask):
            replies = list(_mutants(grid.kept, kind, each, seed=len(overrides)))
            seen += len(replies)
            with monkeypatch.context() as patch:
                patch.setattr(driver.exchange, "send", lambda *_, r=replies: iter(r))
                patch.setattr(driver.exchange, "_deliver", lambda *_, r=replies: iter(r))
                if kind in ask:
                    ask[kind](1)
                    continue
                nodes = Nodes(driver.exchange, server)
                nodes.by_client = {7: 7}  # somebody is there whatever comes
                patch.setattr(grid, "get_node_ids", lambda: [7, 8])
                nodes.register(1)
                assert all(type(c) is int and 0 <= c < 8 for c in nodes.by_client)
        assert all(len(event.reason) <= REASON for event in run.events(ReplyRefused))
        for event in [*run.events(ClientTrained), *run.events(ClientEvaluated)]:
            numbers = [v for v in vars(event).values() if isinstance(v, int | float)]
            assert all(math.isfinite(number) for number in numbers), event
        assert len(run.events(ReplyRefused)) - before > each  # most mutations are noticed
    assert seen == 8 * each
