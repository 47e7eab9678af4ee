"""Knowledge that ages: who counts by old answers, by how much, and by none in quarantine."""

from collections.abc import Collection
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedkd.config import ConfigError
from fedkd.knowledge.kinds import Logits
from fedkd.knowledge.query import Images
from fedkd.rounds import ExperimentContext, Server
from fedkd.rounds.stale import aged, collect, sources
from fedkd.runs.directory import RunDirectory
from fedkd.runs.events import OldAnswersCounted, RoundFinished
from fedkd.runs.quarantine import strike
from fedkd.simulations.client_app import make_client_app
from fedkd.simulations.local import run_local
from fedkd.strategies.records import JOB
from fedkd.studies.unlearning import check_removal, distil_again, erasable, prepare
from tests.conftest import Tiny

pytestmark = pytest.mark.usefixtures("lean")

QUICK = ("teachers={models: [mlp], epochs: 1}", "distillation={losses: [dkd, ce], epochs: 1}")
STALE = ("federation.stale={keep: 1, decay: 0.25}", "data.views.refresh=false", "rounds=3", *QUICK)

TOGETHER = ("transfer", "fused")


def absent(client: int, rounds: Collection[int]) -> ClientApp:
    """One client fails to train in some rounds."""

    def mod(message: Message, context: Context, call_next: Any) -> Message:
        mine = int(context.node_config["partition-id"]) == client
        now = message.content.config_records[JOB]["round"] in rounds
        if mine and now and message.metadata.message_type == "train":
            raise OSError("the disk is full")
        return call_next(message, context)

    return make_client_app([mod])


def hashes(run: RunDirectory) -> list[str | None]:
    return [event.hash for event in run.events(RoundFinished)]


def test_who_was_away_counts_by_its_last_answers_for_so_many_rounds(tiny: Tiny) -> None:
    run = run_local(tiny(*STALE), client_app=absent(1, (2, 3)))
    assert [(e.round, e.clients) for e in run.events(OldAnswersCounted)] == [(2, {1: 1})]
    of_round = [event.weights for event in run.events(RoundFinished)]
    assert [sorted(weights) for weights in of_round] == [[0, 1, 2], [0, 1, 2], [0, 2]]
    assert 0 < of_round[1][1] < of_round[0][1]
    without = run_local(tiny(*STALE[1:]), client_app=absent(1, (2, 3)))
    assert not run_local(tiny(*STALE)).events(OldAnswersCounted)
    assert hashes(run)[0] == hashes(without)[0]
    assert hashes(run)[1] != hashes(without)[1]


def test_going_on_after_a_kill_and_distilling_again_count_the_same_old_answers(tiny: Tiny) -> None:
    app = absent(1, (2, 3))
    run = run_local(tiny(*STALE, "federation.quorum=0.1"), client_app=app)
    once = hashes(run)
    (run.path / "checkpoints" / "round-0003.pt").unlink()
    (run.path / "checkpoints" / "round-0002.pt").unlink()
    assert hashes(run_local(run.experiment, run=run, client_app=app)) == once
    fused = [path.parts[-3] for path in erasable(run, [1]) if path.parts[-2:] == TOGETHER]
    assert fused == ["round-0001", "round-0002"]
    again = prepare(run, [0])
    distil_again(again, ExperimentContext(again.experiment))
    assert [(e.round, e.clients) for e in again.events(OldAnswersCounted)] == [(2, {1: 1})]


def test_a_client_in_quarantine_does_not_count_by_its_old_answers(tiny: Tiny) -> None:
    experiment = tiny(*STALE, "federation.quarantine.after=1")
    run = run_local(experiment, client_app=absent(1, (2,)))
    assert sources(run, 2, experiment.federation) == {0: 2, 1: 1, 2: 2}
    strike(run, 1, 1, "a lie")
    assert sources(run, 2, experiment.federation) == {0: 2, 2: 2}
    with pytest.raises(ConfigError, match=r"federation\.stale: .* strikes"):
        check_removal(run, [0])


def test_each_answer_has_the_age_of_its_own_question(tiny: Tiny) -> None:
    """Where a round asks about a part, the others keep the age that they had."""
    experiment = tiny(*STALE, "federation.subset=0.25")
    run = run_local(experiment, client_app=absent(1, (3,)))
    context = ExperimentContext(experiment)
    server = Server(context, run)
    rounds = sources(run, 3, experiment.federation)
    assert rounds == {0: 3, 1: 2, 2: 3}
    bank = collect(run, Images.TRANSFER, context.kinds, rounds)
    assert [teacher.number for teacher in bank.teachers] == [0, 1, 2]
    stored = run.knowledge(2).answers(1, (Logits(),))[Logits()]
    assert np.array_equal(bank.arrays[Logits()][1], stored)
    decay = aged(bank, context, rounds, server.base).decay
    assert decay is not None
    last, before = (np.isin(np.arange(48), context.subset(number)) for number in (3, 2))
    expected = np.where(last & before, 0.25, np.where(last, 0.25**2, 1.0))
    assert np.array_equal(decay[1], expected.astype(np.float32))
    assert np.array_equal(decay[0], np.ones(48, np.float32))
    kept = aged(bank, context, rounds, server.base).only([0, 1])
    assert np.array_equal(kept.decay, decay[:2])
    mixed = kept.rows(torch.from_numpy(np.flatnonzero(last & before))).weights
    assert mixed[:, 0].tolist() == pytest.approx([0.8, 0.2])


def test_old_answers_and_new_views_in_every_round_do_not_fit(tiny: Tiny) -> None:
    with pytest.raises(ConfigError, match=r"federation\.stale\.keep: .*data\.views\.refresh=false"):
        ExperimentContext(tiny("federation.stale.keep=1"))
    ExperimentContext(tiny("federation.stale.keep=1", "distillation.losses=[ce]"))
