"""Teachers that the server has from files: part of the ensemble, refused where they cannot be."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fedkd.config import Component, ConfigError, Experiment, make_experiment
from fedkd.knowledge.kinds import Logits
from fedkd.knowledge.payload import Role
from fedkd.knowledge.query import Images
from fedkd.reporting.run_page import make_page
from fedkd.reporting.run_record import Found
from fedkd.rounds import ExperimentContext, evidence_of
from fedkd.rounds.server_teachers import server_teachers_of
from fedkd.runs.directory import RunDirectory
from fedkd.runs.events import RoundFinished
from fedkd.simulations.local import run_local
from fedkd.simulations.ray import run_ray
from fedkd.training.evaluation import accuracy, predict
from fedkd.training.supervised import fit
from tests.conftest import Tiny
from tests.models.test_weights import CLIP, TINY_CLIP, tiny_clip

pytestmark = pytest.mark.usefixtures("lean")
ENTRY = "{name: cnn_tiny, weights: good.pt}"
OTHERS = "distillation.losses=[ce, kd]"


@pytest.fixture
def good(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tiny:
    """A teacher that has seen all private images, in a file below FEDKD_DATA."""
    monkeypatch.setenv("FEDKD_DATA", str(tmp_path))
    context = ExperimentContext(tiny())
    network = context.network(Component(name="cnn_tiny"), "good")
    fit(network, context.data.pooled(), epochs=8, batch_size=16, seed=1)
    about = {"model": "cnn_tiny", "classes": list(context.data.classes)}
    torch.save({**about, "weights": network.state_dict()}, tmp_path / "good.pt")

    def make(*overrides: str) -> Experiment:
        return tiny(f"teachers.server=[{ENTRY}]", OTHERS, "fusion=uniform", *overrides)

    return make


def student(run: RunDirectory) -> str:
    return str(run.read_json("summary.json")["hash"])


def test_it_is_one_more_teacher_of_the_ensemble(good: Tiny) -> None:
    experiment = good("teachers.epochs=1")
    run = run_local(experiment)
    last = run.events(RoundFinished)[-1]
    (its,) = last.server_teachers
    assert its > max(value for value in last.teachers.values() if value is not None)
    assert last.server_weights == pytest.approx([0.25])
    assert list(last.weights.values()) == pytest.approx([0.25] * 3)
    context = ExperimentContext(experiment)
    bank = evidence_of(context, run, 2, run.knowledge(2).bank(context.kinds), None).bank
    assert [(t.number, t.role) for t in bank.teachers][-1] == (3, Role.SERVER)
    network = context.network(experiment.teachers.server[0], "server", 0)
    answers = predict(network, context.data.transfer.images.images)
    assert np.allclose(bank.arrays[Logits()][-1], answers, atol=1e-5)
    tests = context.images(Images.TEST, None)
    assert its == accuracy(predict(network, tests.images), tests.labels)
    assert "weights good.pt" in run.read_json("versions.json")
    page = make_page(Found(run))
    assert "(mlp, cnn_tiny) and 1 of the server's own (cnn_tiny), who answer" in page.sentence
    assert page.sections[0].cards[1].fold == "The 4 teachers"


def test_a_run_that_was_stopped_comes_to_the_same_student(good: Tiny) -> None:
    class Stopped(Exception):
        pass

    def stop(event: str, **facts: object) -> None:
        if event == "round_start" and facts["round"] == 2:
            raise Stopped

    whole = run_local(good())
    with pytest.raises(Stopped):
        run_local(good(), notify=stop)
    (half,) = [path for path in whole.path.parent.iterdir() if path != whole.path]
    assert student(run_local(good(), run=RunDirectory.open(half))) == student(whole)


@pytest.mark.parametrize(
    "words",
    [
        ("federation.stale.keep=2", "federation.participation=2"),
        ("data.validation=20", "fusion=[learned_gate]", "distillation.assistants=[cnn_tiny]"),
    ],
)
def test_rules_losses_and_absent_clients_take_it_as_any_other(
    good: Tiny, words: tuple[str, ...]
) -> None:
    run = run_local(good("teachers.epochs=1", *words))
    assert [e.status for e in run.events(RoundFinished)] == ["ok", "ok"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("fusion=[density_ratio]",), r"fusion\.0: 'density_ratio' weighs teachers by their priv"),
        (("fusion=[class_gated]",), r"fusion\.0: 'class_gated' weighs teachers by their private"),
        (("fusion=[entropy, sample_count]",), r"fusion\.1: 'sample_count' weighs"),
        (("teachers.server=[cnn_tiny]",), r"teachers\.server\.0: 'cnn_tiny' is trained by nobody"),
        (
            ("teachers.server=[{name: mlp, weights: good.pt}]",),
            r"teachers\.server\.0: .*does not fit mlp for 4 classes \(the file is of cnn_tiny\)",
        ),
        (
            ("teachers.server=[{name: cnn_tiny, weights: gone.pt}]",),
            r"teachers\.server\.0: there is no file .*gone\.pt \(nothing is downloaded\)",
        ),
        (
            ("teachers.server=[{name: cnn_tiny, weights: good.pt, peft: head}]",),
            r"teachers\.server\.0\.peft: nothing of it is trained",
        ),
        (
            ("teachers.server=[{name: cnn_tiny, weights: headless.pt}]",),
            r"teachers\.server\.0: .*headless\.pt does not fit .* it has no 'body\.head",
        ),
        (
            ("release={name: gnmax, epsilon: 8}", "clients=40", "evaluation.baselines=[]"),
            r"teachers\.server: must be \[\] with release 'gnmax'",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_there_is_a_folder(
    good: Tiny, tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    state = torch.load(tmp_path / "good.pt")["weights"]
    body = {k: t for k, t in state.items() if "head" not in k}
    torch.save(body, tmp_path / "headless.pt")
    with pytest.raises(ConfigError, match=message) as error:
        run_local(good(*words))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "runs").exists()


def test_left_open_the_rule_is_one_that_they_have_a_place_in() -> None:
    experiment = make_experiment({}, [f"teachers.server=[{ENTRY}]"])
    assert [rule.name for rule in experiment.fusion] == ["uniform"]


def test_a_zero_shot_classifier_teaches_by_its_cosines(
    good: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file(tiny_clip().state_dict(), tmp_path / "clip.safetensors")
    entry: dict[str, Any] = {"weights": "clip.safetensors", "prompts": "a photo of a {}."}
    model = Component(**{"name": CLIP, **entry, **TINY_CLIP})
    base = good("rounds=1")
    teachers = base.teachers.model_copy(update={"server": (model,)})
    experiment = base.model_copy(update={"teachers": teachers})
    context = ExperimentContext(experiment)
    (network,) = server_teachers_of(context)._networks
    assert network.head is not None
    scale = network.head.weight.detach().norm(dim=1)
    assert torch.allclose(scale, scale[:1].expand(4))
    logits = predict(network, context.data.transfer.images.images)
    assert float(logits.abs().max()) <= float(scale[0]) * (1 + 1e-4)
    run = run_local(experiment)
    assert len(run.events(RoundFinished)[-1].server_teachers) == 1


@pytest.mark.slow
def test_ray_comes_to_the_same_student(good: Tiny) -> None:
    assert student(run_ray(good())) == student(run_local(good()))
