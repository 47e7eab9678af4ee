"""Codecs in whole runs: fewer bytes, both ends in step, also after faults and restarts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fedkd.config import ConfigError, Experiment
from fedkd.rundir import RunDirectory
from simulations.local import run_local
from tests.simulations.faults import tampering

Tiny = Callable[..., Experiment]
DELTA = "federation.codec={name: delta, inner: float32}"


def _hash(run: RunDirectory) -> str:
    return str(run.read_json("summary.json")["hash"])


def _up(run: RunDirectory) -> int:
    return int(run.read_json("summary.json")["bytes"]["knowledge"]["up"])


def test_lossless_changes_give_the_same_student_for_fewer_bytes(tiny: Tiny) -> None:
    """Teachers that stand still after their first epoch have nothing more to send."""
    still = ("teachers.optimizer.lr=1e-12", "data.views.refresh=false", "rounds=3")
    plain = run_local(tiny("federation.codec=float32", *still))
    delta = run_local(tiny(DELTA, *still))
    assert _hash(delta) == _hash(plain)
    assert _up(delta) < 0.75 * _up(plain)


def test_moving_teachers_stay_in_step(tiny: Tiny) -> None:
    rounds = "rounds=3"
    assert _hash(run_local(tiny(DELTA, rounds))) == _hash(
        run_local(tiny("federation.codec=float32", rounds))
    )


def test_a_refused_round_does_not_put_the_ends_out_of_step(tiny: Tiny) -> None:
    """Client 1 is refused throughout round 2; in round 3 its changes are against round 1."""

    def replayed(arrays: dict[str, Any], header: dict[str, Any]) -> None:
        if header["round"] == 2:
            header["round"] = 1

    runs = [
        run_local(tiny(codec, "rounds=3"), client_app=tampering({1: replayed}))
        for codec in (DELTA, "federation.codec=float32")
    ]
    assert [e["client"] for e in runs[0].metrics("refused")] == [1]
    assert _hash(runs[0]) == _hash(runs[1])


def test_a_typo_in_the_codec_is_named(tiny: Tiny) -> None:
    with pytest.raises(ConfigError, match=r"federation\.codec.*float16"):
        run_local(tiny("federation.codec=flaot16"))
    with pytest.raises(ConfigError, match="bits"):
        run_local(tiny("federation.codec={name: int, bits: 3}"))
