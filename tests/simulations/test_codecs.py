"""Codecs in whole runs: fewer bytes, both ends in step, also after faults and restarts."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message

from fedkd.config import ConfigError, load_experiment, read_experiment
from fedkd.knowledge.kinds import Logits
from fedkd.rounds import ExperimentContext
from fedkd.runs.directory import RunDirectory
from fedkd.runs.events import ReplyRefused
from fedkd.simulations.client_app import make_client_app
from fedkd.simulations.local import run_local
from fedkd.strategies.records import JOB
from tests.conftest import Tiny
from tests.simulations.faults import tampering

pytestmark = pytest.mark.usefixtures("lean")


DELTA = "federation.codec={name: delta, inner: float32}"
SUBSET = ("federation.subset=0.25", "data.views.refresh=false", "rounds=3")


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


def replayed(arrays: dict[str, Any], header: dict[str, Any]) -> None:
    if header["round"] == 2:
        header["round"] = 1


def test_a_refused_round_does_not_put_the_ends_out_of_step(tiny: Tiny) -> None:
    """Client 1 is refused throughout round 2; in round 3 its changes are against round 1."""
    runs = [
        run_local(tiny(codec, "rounds=3"), client_app=tampering({1: replayed}))
        for codec in (DELTA, "federation.codec=float32")
    ]
    assert [e.client for e in runs[0].events(ReplyRefused)] == [1]
    assert _hash(runs[0]) == _hash(runs[1])


def test_a_typo_in_the_codec_is_named(tiny: Tiny) -> None:
    with pytest.raises(ConfigError, match=r"federation\.codec.*float16"):
        run_local(tiny("federation.codec=flaot16"))
    with pytest.raises(ConfigError, match="bits"):
        run_local(tiny("federation.codec={name: int, bits: 3}"))


def test_a_part_of_the_samples_is_asked_and_the_rest_is_kept(tiny: Tiny) -> None:
    run = run_local(tiny(*SUBSET))
    one, two = (run.knowledge(n).bank((Logits(),)).arrays[Logits()] for n in (1, 2))
    for before, after in zip(one, two, strict=True):
        changed = (np.asarray(before) != np.asarray(after)).any(axis=1)
        assert before.shape == after.shape == (48, 4)
        assert 0 < changed.sum() <= 12
        assert set(np.flatnonzero(changed)) <= set(ExperimentContext(run.experiment).subset(2))
    assert _up(run) < 0.9 * _up(run_local(tiny("data.views.refresh=false", "rounds=3")))


def test_changes_of_a_part_give_the_same_student_as_the_part(tiny: Tiny) -> None:
    """Also if a client is refused in round 2."""
    plain, delta = (
        run_local(tiny(codec, *SUBSET), client_app=tampering({1: replayed}))
        for codec in ("federation.codec=float32", DELTA)
    )
    assert _hash(delta) == _hash(plain)


def test_a_client_that_lost_its_answers_does_without_them(tiny: Tiny) -> None:
    """A node that comes back without its files is not out of step."""

    def forget(message: Message, context: Context, call_next: Any) -> Message:
        state = message.content.config_records[JOB]["state"]
        for kept in Path(str(state)).glob("client-0001/answers-*.npz"):
            kept.unlink()
        return call_next(message, context)

    runs = [
        run_local(tiny(codec, *part), client_app=make_client_app([forget]))
        for part in (("rounds=3",), SUBSET)
        for codec in (DELTA, "federation.codec=float32")
    ]
    assert not any(run.events(ReplyRefused) for run in runs)
    assert _hash(runs[0]) == _hash(runs[1])
    assert _hash(runs[2]) == _hash(runs[3])


def test_a_part_and_new_views_in_every_round_do_not_fit(tiny: Tiny) -> None:
    with pytest.raises(ConfigError, match=r"federation\.subset: .*data\.views\.refresh=false"):
        run_local(tiny("federation.subset=0.5"))


def test_the_old_key_names_its_successor(tiny: Tiny) -> None:
    with pytest.raises(ConfigError, match=r"federation\.dtype: is called federation\.codec"):
        tiny("federation.dtype=float16")


def test_the_job_travels_small() -> None:
    codec = "federation.codec={tolerance: 0.1, name: delta, inner: {name: int, bits: 4}}"
    experiment = load_experiment("configs/fashion_mnist.yaml", [codec])
    assert len(experiment.to_bytes()) < 600
    assert read_experiment(experiment.to_bytes()) == experiment
