"""However fused answers are made, they stay with the images that they are about."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import fedkd
from fedkd.config import Experiment
from fedkd.distillation.assistants import with_assistant
from fedkd.distillation.batches import TransferBatches
from fedkd.knowledge.kinds import Logits
from fedkd.knowledge.payload import Bank, Fused, Knowledge, Teacher, fuse
from fedkd.rounds import ExperimentContext, silent
from fedkd.rounds.learners import Learners
from fedkd.runs.directory import RunDirectory

INDEX = torch.tensor([2, 3, 7, 11])


def _logits(count: int) -> Tensor:
    return 3 * torch.randn(count, 3, generator=torch.Generator().manual_seed(0))


def _knowledge(client: int, count: int = 4) -> Knowledge:
    return Knowledge(Teacher(client), {Logits(): torch.roll(_logits(count), client, 0)})


PATHS: dict[str, Callable[[Fused], Fused]] = {
    "takd": lambda fused: with_assistant(fused, _knowledge(8), "takd", 1),
    "dgkd": lambda fused: with_assistant(fused, _knowledge(8), "dgkd", 2),
    "replaced": lambda fused: fused.replaced_by(_knowledge(7)),
    "with teacher": lambda fused: fused.with_teacher(_knowledge(7), 0.5),
}


@pytest.mark.parametrize("names", list(itertools.product(PATHS, PATHS)), ids="-".join)
def test_any_path_from_one_to_another_keeps_the_index_and_the_targets(
    names: tuple[str, str],
) -> None:
    fused = Fused.of(Teacher(5), _logits(4), targets=torch.tensor([2, 2, 1, 0]), index=INDEX)
    for name in names:
        fused = PATHS[name](fused)
        assert fused.index is INDEX
        assert fused.targets.tolist() == [2, 2, 1, 0]
        assert len(fused) == len(fused.probabilities) == len(INDEX)
        torch.testing.assert_close(fused.probabilities.sum(1), torch.ones(4))
        weights = fused.bank.rows(torch.arange(4)).weights
        torch.testing.assert_close(weights.sum(0), torch.ones(4))


@pytest.mark.parametrize("path", PATHS)
def test_answers_about_another_number_of_images_are_refused(path: str) -> None:
    """By every path: the added knowledge below is always about 4 images."""
    with pytest.raises(ValueError, match=r"(3.*4|4.*3)"):
        PATHS[path](Fused.of(Teacher(5), _logits(3), index=INDEX[:3]))


def test_parts_of_different_lengths_are_refused() -> None:
    fused = fuse(Bank.of([_knowledge(0), _knowledge(1)]), [])
    with pytest.raises(ValueError, match=r"fused.index: the teachers have answered about 4 images"):
        replace(fused, index=INDEX[:2])
    with pytest.raises(ValueError, match=r"fused.targets: .* 4 images, here are 5"):
        replace(fused, targets=torch.zeros(5, dtype=torch.long))
    with pytest.raises(ValueError, match="1 teachers, but 2 give logits"):
        Bank((Teacher(0),), {Logits(): [np.zeros((2, 3))] * 2})
    with pytest.raises(ValueError, match="answer about 2 images"):
        Bank((Teacher(0), Teacher(1)), {Logits(): [np.zeros((2, 3)), np.zeros((3, 3))]})
    with pytest.raises(ValueError, match="weights of 1 teachers on 2 images"):
        Bank((Teacher(0),), {Logits(): [np.zeros((2, 3))]}, np.ones((1, 3)))


def test_nobody_else_puts_one_together_by_hand() -> None:
    root = Path(__file__).parents[2]
    makers = [
        file.relative_to(root).as_posix()
        for package in ("fedkd", "strategies", "simulations")
        for file in sorted((root / package).rglob("*.py"))
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Fused"
    ]
    assert makers == ["fedkd/knowledge/payload.py"]


def test_lessons_refuse_images_that_are_not_those_of_the_answers() -> None:
    images = fedkd.load_dataset("synthetic", classes=3, size=8, per_class=4)[0].images[:8]
    fused = Fused.of(Teacher(0), _logits(4), index=INDEX)
    with pytest.raises(ValueError, match="answered about 4 images, here are 8"):
        TransferBatches(images, fused)
    batches = TransferBatches(images[:4], fused, views=lambda _number: images)
    batch = batches.example()
    assert batch.virtual is not None
    with pytest.raises(ValueError, match="view 0 has 8 images, the real one 4"):
        batch.virtual(0)


@pytest.mark.parametrize("assistant_mode", ["takd", "dgkd"])
def test_after_a_release_assistants_and_student_learn_the_images_that_were_answered(
    tiny: Callable[..., Experiment], assistant_mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = ExperimentContext(
        tiny(
            "distillation.losses=[kd]", "fusion=[uniform]",
            "release={name: gnmax, epsilon: 500, min_votes: 3}",
            "evaluation={teachers: false, clients: false, baselines: []}",
            "distillation.assistants=[mlp, mlp]", f"distillation.assistant_mode={assistant_mode}",
        )
    )  # fmt: skip
    images, shown = workspace.data.transfer.images.images, []

    class Noted(TransferBatches):
        def __init__(self, images: Tensor, fused: Fused, **more: object) -> None:
            shown.append((images, fused))
            super().__init__(images, fused, **more)  # type: ignore[arg-type]

    monkeypatch.setattr("fedkd.rounds.learners.TransferBatches", Noted)
    learners = Learners(workspace, RunDirectory.new(workspace.experiment), silent)
    answered = torch.arange(0, len(images), 3)
    scores = torch.softmax(torch.randn(len(answered), 4), dim=1)
    fused = Fused.of(Teacher(3), scores.log(), probabilities=scores, index=answered)
    learners.learn(1, fused)
    assert len(shown) == 3
    for part, seen in shown:
        assert part.equal(images[answered])
        assert seen.index is answered
