"""Clients that know different classes, from config to page."""

from dataclasses import replace
from pathlib import Path

import pytest

from fedkd.config import ConfigError
from fedkd.data.images import class_map
from fedkd.knowledge.query import Images, Refused, Reply
from fedkd.knowledge.wire import unpack
from fedkd.rounds import ExperimentContext, experiment_context
from fedkd.rounds.client import Client, train_together
from fedkd.runs.directory import RunDirectory
from fedkd.runs.events import RoundFinished
from fedkd.simulations.local import run_local
from fedkd.simulations.ray import run_ray
from tests.conftest import Tiny

LISTS = [[0, 1], [2, 3], ["pattern 3", 0]]
DEALT = [[0, 1], [2, 3], [3, 0]]
PARTS = (
    f"data.partition={{name: by_class, classes: {DEALT}}}",
    f"teachers.classes={LISTS}",
    "fusion=[specialists]",
)


def last(run: RunDirectory) -> RoundFinished:
    return list(run.events(RoundFinished))[-1]


@pytest.mark.parametrize("codec", ["float16", "{name: topk, k: 3}", "vote", "{name: delta}"])
def test_a_run_of_specialists(tiny: Tiny, lean: None, codec: str) -> None:
    run = run_local(tiny(*PARTS, f"federation.codec={codec}"))
    found = last(run)
    assert found.status == "ok"
    assert all(score is not None and score <= 0.7 for score in found.teachers.values())
    assert found.ensemble is not None
    assert found.ensemble.accuracy > max(filter(None, found.teachers.values()))


def test_teacher_by_teacher_batched_and_alone(tiny: Tiny, tmp_path: Path) -> None:
    words = (*PARTS, "fusion=[density_ratio]", "distillation.losses=[ce, subset_kd]")
    context = experiment_context(tiny(*words, "teachers.models=[{name: cnn_tiny, norm: batch}]"))
    ways = [[Client(context, n, "run", tmp_path / way / str(n)) for n in range(3)] for way in "ab"]
    together, alone = train_together(ways[0], 1), [client.train(1) for client in ways[1]]
    for one, two in zip(together, alone, strict=True):
        assert not isinstance(one, Exception)
        assert one.loss == pytest.approx(two.loss, rel=1e-3)
    assert ways[0][2].answer(Images.TRANSFER, 1).arrays["logits"].shape == (48, 2)


@pytest.mark.slow
def test_on_ray_it_is_the_student_of_the_local_runner(tiny: Tiny) -> None:
    words = (*PARTS, "fusion=[density_ratio]", "distillation.losses=[ce, subset_kd]")
    found = [last(run(tiny(*words))).hash for run in (run_local, run_ray)]
    assert found[0] == found[1]


def test_another_idea_of_the_classes_is_refused_by_their_map(tiny: Tiny, tmp_path: Path) -> None:
    context = experiment_context(tiny(*PARTS))
    query = context.query(Images.TRANSFER, "run", 1, 2)
    assert query.class_map == class_map(("pattern 0", "pattern 3"))
    client = Client(context, 2, "run", tmp_path)
    client.train(1)
    sent = client.answer(Images.TRANSFER, 1)
    assert unpack(sent, query, 2).teacher.knows == (True, False, False, True)
    other = {**sent.header, "class_map": class_map(("pattern 1", "pattern 3"))}
    with pytest.raises(Refused, match="has class map"):
        unpack(Reply(sent.arrays, other), query, 2)
    with pytest.raises(Refused, match="2 classes per sample, expected 4"):
        unpack(sent, replace(query, shapes={kind: (4,) for kind in query.shapes}), 2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["teachers.classes=[[0,1],[2,3]]"], "expected those of 3 clients, got 2"),
        (["teachers.feedback.use=regulariser"], "teachers.feedback.use: must be none with"),
        (["teachers.privacy={mechanism: label_dp, epsilon: 1}", "fusion=uniform",
          "evaluation.clients=false", "evaluation.baselines=[]"], "mechanism: must be dp_sgd with"),
        (["fusion=[knowledge_vote]"], "teachers.classes: fusion 'knowledge_vote' takes every"),
        (["fusion=[uniform]"], "teachers.classes: loss 'dkd' takes every teacher to know every"),
        (["teachers.classes=[[0,1],[2,3],[0,pattern 9]]"], "there is no class 'pattern 9'"),
        (["teachers.classes=[[0,1],[2,3],[0,0]]"], "class 'pattern 0' is listed twice"),
        (["teachers.classes=[[0,1],[2,3],[0,1]]"], "client 2: .* of other classes than"),
        (["teachers.classes=[[0,1],[2,1],[0,1]]", "data.partition={name: by_class, "
          "classes: [[0,1],[1,2],[0,1]]}"], "nobody knows class 'pattern 3'"),
    ],
)  # fmt: skip
def test_what_cannot_be_with_specialists_is_refused_by_name(
    tiny: Tiny, words: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        ExperimentContext(tiny(*PARTS, *words))
