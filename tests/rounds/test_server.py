"""What a server accepts, and the round without clients."""

from dataclasses import replace

import numpy as np
import pytest

from fedkd.knowledge.query import Images, Refused, Reply
from fedkd.rounds import Client, ExperimentContext, Server
from fedkd.runs.directory import RunDirectory
from tests.conftest import Tiny

RULE = ("fusion=[learned_gate]", "data.validation=30", "teachers.models=[mlp]")
QUIET = ("student.model=mlp", "teachers.epochs=1", "evaluation.teachers=false", "rounds=1")


@pytest.fixture
def server(tiny: Tiny) -> Server:
    context = ExperimentContext(tiny(*RULE, *QUIET))
    return Server(context, RunDirectory.new(context.experiment))


def replies(server: Server, number: int) -> dict[Images, Reply]:
    folder = server.run.path / "clients" / f"client-{number:04d}"
    folder.mkdir(parents=True)
    client = Client(server.context, number, server.run.identity, folder)
    client.train(1)
    return {images: client.answer(images, 1) for images in server.context.learning_images}


def held(server: Server) -> dict[Images, list[int]]:
    return {images: server.run.knowledge(1, images).clients() for images in Images}


def test_replies_of_a_message_are_kept_all_or_none(server: Server) -> None:
    asked, sent = server.context.learning_images, replies(server, 0)
    assert asked == (Images.VALIDATION, Images.TRANSFER)
    wrong = {name: np.full_like(array, np.nan) for name, array in sent[asked[1]].arrays.items()}
    torn = {**sent, Images.TRANSFER: replace(sent[Images.TRANSFER], arrays=wrong)}
    for bad, reason in (
        (torn, "NaN"),
        ({Images.TRANSFER: sent[Images.TRANSFER]}, "answers about transfer images, asked about"),
        ({**sent, Images.TEST: sent[Images.TRANSFER]}, "asked about transfer and validation"),
        (dict(zip(asked, reversed([*sent.values()]))), "has validation set '.*', expected"),
    ):
        with pytest.raises(Refused, match=reason):
            server.accept(0, 1, asked, bad)
        assert not any(held(server).values())
    server.accept(0, 1, asked, sent)
    empty = {Images.TEST: [], Images.SOURCES: []}
    assert held(server) == {Images.TRANSFER: [0], Images.VALIDATION: [0], **empty}


def test_a_round_needs_no_transport(server: Server) -> None:
    """Of answers that are held already; without a quorum the student stays as it is."""
    degraded = server.run_round(1)
    assert (degraded.status, degraded.answered, degraded.weights) == ("degraded", [], {})
    for number in range(3):
        server.accept(number, 1, server.context.learning_images, replies(server, number))
    finished = server.run_round(1)
    assert (finished.status, finished.answered) == ("ok", [0, 1, 2])
    assert finished.hash != degraded.hash
    assert sum(finished.weights.values()) == pytest.approx(1)
    assert Server(server.context, server.run).round == 1
