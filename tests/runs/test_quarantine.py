"""Quarantine: strikes add up over rounds, survive a resume, and can be lifted."""

import numpy as np
import pytest
import torch

from fedkd.config import Quarantine
from fedkd.knowledge.kinds import Logits
from fedkd.knowledge.payload import AGGREGATE, Bank, Fused, Teacher
from fedkd.runs.directory import RunDirectory
from fedkd.runs.events import ReplyRefused, RoundFinished
from fedkd.runs.quarantine import distrusted, lift, quarantined, strike, strikes
from fedkd.simulations.local import run_local
from tests.conftest import Tiny
from tests.simulations.faults import BAD_PAYLOADS, tampering

pytestmark = pytest.mark.usefixtures("lean")


QUICK = ("teachers.models=[mlp]", "student.model=mlp")
NAN = BAD_PAYLOADS["nan"][0]


def test_a_client_is_left_out_after_its_strikes_and_says_so_each_round(tiny: Tiny) -> None:
    run = run_local(
        tiny("rounds=4", "federation.quarantine.after=2", *QUICK), client_app=tampering({1: NAN})
    )
    refused = [(r.round, r.phase) for r in run.events(ReplyRefused)]
    assert refused == [(1, "knowledge"), (2, "knowledge"), (3, "train"), (4, "train")]
    reason = run.events(ReplyRefused)[-1].reason
    assert "in quarantine after 2 strikes" in reason
    assert f"fedkd quarantine {run.identity} --lift 1" in reason
    assert [r.answered for r in run.events(RoundFinished)] == [[0, 2]] * 4
    asked = {(e.round, e.client) for e in run.messages() if e.phase == "train"}
    assert (2, 1) in asked
    assert not {(3, 1), (4, 1)} & asked


def test_lifting_lets_the_client_in_again(tiny: Tiny) -> None:
    class Stop(Exception):
        pass

    def stop(event: str, **facts: object) -> None:
        if event == "round_start" and facts["round"] == 3:
            raise Stop

    experiment = tiny("rounds=3", "federation.quarantine.after=1", *QUICK)
    run = RunDirectory.new(experiment)
    with pytest.raises(Stop):
        run_local(experiment, run=run, client_app=tampering({1: NAN}), notify=stop)
    assert [*quarantined(run, experiment.federation.quarantine)] == [1]
    assert lift(run, 1) == 1
    run_local(experiment, run=RunDirectory.open(run.path))  # the client is mended
    assert [r.answered for r in run.events(RoundFinished)] == [[0, 2], [0, 2], [0, 1, 2]]


def test_without_a_limit_nobody_is_left_out(tiny: Tiny) -> None:
    run = RunDirectory.new(tiny())
    for number in range(5):
        strike(run, number, 0, "noise")
    assert quarantined(run, Quarantine()) == {}
    assert [*quarantined(run, Quarantine(after=5))] == [0]
    assert quarantined(run, Quarantine(after=6)) == {}
    lift(run, 0)
    strike(run, 6, 0, "again")
    assert strikes(run) == {0: ["round 6: again"]}


def test_no_say_is_less_than_a_thousandth_of_an_equal_one() -> None:
    weights = np.array([[0.5, 0.9], [0.5, 0.1], [0.0, 0.0004]], dtype=np.float32)
    bank = Bank(
        tuple(map(Teacher, (4, 5, 9))), {Logits(): [np.zeros((2, 2), np.float32)] * 3}, weights
    )
    fused = Fused(bank, torch.full((2, 2), 0.5), torch.zeros(2, dtype=torch.long))
    assert distrusted(fused, 0.001) == [9]
    assert distrusted(fused, 0.0) == []
    merged = Bank((AGGREGATE,), {Logits(): bank.arrays[Logits()][:1]}, np.ones((1, 2)))
    assert distrusted(Fused(merged, fused.probabilities, fused.targets), 0.5) == []
