"""Clients that see one thing and a student that sees another: runs, nodes, refusals."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedkd.build import build_data
from fedkd.config import ConfigError, Experiment, make_experiment
from fedkd.data.local_shard import LocalShard, write_private, write_public
from fedkd.knowledge.query import Images
from fedkd.rounds import ExperimentContext
from fedkd.runs.directory import RunDirectory
from fedkd.runs.events import RoundFinished
from fedkd.runs.export import export_student, predict_files
from fedkd.simulations.baselines import BASELINES
from fedkd.simulations.client_app import make_client_app
from fedkd.simulations.compare.config import Comparison
from fedkd.simulations.compare.study import CompareStudy
from fedkd.simulations.deploy.folder import policy_text
from fedkd.simulations.job import run_job
from fedkd.simulations.local import LocalGrid, run_local

PAIRS: dict[str, Any] = {
    "name": "pairs",
    "rounds": 2,
    "clients": 3,
    "data": {
        "partition": "iid",
        "transfer": {
            "size": 40,
            "pairs": {
                "audio": {"name": "synthetic", "classes": 4, "size": 12, "per_class": 40},
                "image": {"name": "synthetic", "classes": 4, "size": 8, "per_class": 30},
            },
        },
        "test": 40,
    },
    "teachers": {
        "models": ["mlp", "cnn_tiny"], "epochs": 2, "modality": {"0-1": "audio", "2": "image"},
    },
    "student": {"model": "cnn_tiny", "modality": "image"},
    "fusion": ["density_ratio", "consensus"],
    "distillation": {"losses": ["ce", "kd", "icl"], "epochs": 2},
    "evaluation": {"baselines": []},
}  # fmt: skip


@pytest.fixture
def paired(tmp_path: Path) -> Any:
    def make(*words: str) -> Experiment:
        return make_experiment(PAIRS, [f"output={tmp_path / 'runs'}", *words])

    return make


def student(run: RunDirectory) -> str:
    return str(run.read_json("summary.json")["hash"])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    output = f"output={tmp_path_factory.mktemp('pairs')}"
    return run_local(make_experiment(PAIRS, [output, "evaluation.baselines=[oracle, ceiling]"]))


# -- what a run does -----------------------------------------------------------------------


def test_each_client_answers_about_its_own_side(paired: Any) -> None:
    context = ExperimentContext(paired())
    for client, size in ((0, 12), (1, 12), (2, 8)):
        for images in (Images.TRANSFER, Images.TEST):
            assert context.images(images, client).side == size
            query = context.query(images, "run", 1, client)
            assert query.num_samples == 40
            assert query.fingerprint == context.images(images, client).fingerprint()
    assert context.architecture(0) != context.architecture(2)  # never trained as one batch
    assert context.cost(0) > 0


def test_a_run_resumed_reaches_the_same_student(paired: Any, finished: RunDirectory) -> None:
    shorter = paired("rounds=1", "evaluation.baselines=[oracle, ceiling]")
    run = run_local(shorter)
    longer = paired("evaluation.baselines=[oracle, ceiling]")
    resumed = run_local(longer, run=RunDirectory(run.path, longer, run.identity))
    assert student(resumed) == student(finished)
    last = finished.events(RoundFinished)[-1]
    assert last.pseudo_labels is not None
    assert last.ensemble is not None
    assert set(last.teachers) == {0, 1, 2}


def test_a_run_goes_on_with_both_its_sides_alone(paired: Any, finished: RunDirectory) -> None:
    copy = finished.path.parent / "copy"
    shutil.copytree(finished.path, copy)
    assert "audio=" in (copy / "signature.json").read_text()
    # Other sounds beside the same pictures: the transfer set is another one.
    other = paired("data.transfer.pairs.audio.dataset.noise=0.5")
    with pytest.raises(ConfigError, match="the fingerprint of the transfer set was audio="):
        run_local(other, run=RunDirectory(copy, other, finished.identity))


def test_only_clients_of_its_modality_judge_the_student(finished: RunDirectory) -> None:
    summary = finished.read_json("summary.json")
    judged = [teacher["student_on_holdout"] for teacher in summary["teachers"]]
    assert judged[:2] == [None, None]
    assert judged[2] is not None
    assert summary["oracle"] is not None
    assert summary["ceiling"] is not None


def test_the_student_reads_pictures_of_its_own_side(finished: RunDirectory, tmp_path: Path) -> None:
    from PIL import Image

    Image.new("L", (30, 30), 90).save(tmp_path / "a.png")
    ((_, answers),) = predict_files(finished, [tmp_path / "a.png"], top=1)
    assert answers[0][0].startswith("pattern")
    done = export_student(finished, "torch", tmp_path / "student.pt2")
    assert (done.missing, done.agreement) == (None, 1.0)
    assert torch.export.load(done.path).module()(torch.zeros(2, 1, 8, 8, dtype=torch.uint8)).shape


@pytest.mark.parametrize("words", [["data.transfer.by=index"], ["fusion=contrastive"]])
def test_a_student_of_both_sees_them_together(
    paired: Any, tmp_path: Path, words: list[str], lean: None
) -> None:
    run = run_local(paired("student.modality=[image, audio]", "rounds=1", *words))
    channels = run.read_json("signature.json")["pictures"]
    assert (channels["channels"], channels["height"]) == (2, 12)
    exported = export_student(run, "torch", tmp_path / "both.pt2")
    assert exported.missing is None
    data = build_data(run.experiment)
    arrays = {f"x_{name}": side.test.images[:3, 0].numpy() for name, side in data.sides.items()}
    np.savez(tmp_path / "three.npz", **arrays)
    found = list(predict_files(run, [tmp_path / "three.npz"], top=4))
    assert [len(answers) for _, answers in found] == [4, 4, 4]
    np.savez(tmp_path / "one.npz", x_image=arrays["x_image"])
    with pytest.raises(ConfigError, match=r"one\.npz: .*x_audio"):
        list(predict_files(run, [tmp_path / "one.npz"]))
    with pytest.raises(ConfigError, match=r"image and audio together: expected an \.npz"):
        list(predict_files(run, [tmp_path / "a.png"]))


def test_promises_and_randomised_labels_hold_across_modalities(paired: Any, lean: None) -> None:
    private = {
        "dp_sgd": "{mechanism: dp_sgd, noise_multiplier: 1.0, nominal_size: 40}",
        "label_dp": "{mechanism: label_dp, epsilon: 3.0}",
    }
    for mechanism, given in private.items():
        run = run_local(
            paired(
                f"teachers.privacy={given}", "fusion=uniform", "evaluation.clients=false",
                "teachers.models=mlp", "rounds=1", "distillation.losses=ce",
            )
        )  # fmt: skip
        assert run.read_json("summary.json")["privacy"]["mechanism"] == mechanism


# -- real nodes ----------------------------------------------------------------------------


def test_nodes_with_their_own_side_alone_reach_the_same_student(
    paired: Any, tmp_path: Path
) -> None:
    experiment = paired("rounds=1")
    expected = student(run_local(experiment))
    whole = build_data(experiment)
    deployed = paired("rounds=1", "data.public=public.npz")
    place = tmp_path / "server"
    write_public(whole, place / "public.npz", answers=True)
    (tmp_path / "policy.yaml").write_text(policy_text(deployed, _server(deployed, place)))
    grid = LocalGrid(make_client_app(), 3)
    for number in range(3):
        node = tmp_path / f"node-{number}"
        write_public(whole, node / "public.npz", answers=False, client=number)
        write_private(whole, number, node / "private.npz")
        grid._contexts[1000 - number].node_config.update(
            {
                "data": str(node / "private.npz"),
                "data-root": str(node),
                "state-dir": str(tmp_path / f"state-{number}"),
                "policy": str(tmp_path / "policy.yaml"),
            }
        )
    with np.load(tmp_path / "node-0" / "public.npz") as file:
        assert sorted(file.files) == [
            "classes", "x_test_audio", "x_transfer_audio", "x_validation_audio",
        ]  # fmt: skip
    summary = run_job(grid, RunDirectory.new(deployed), _server(deployed, place), simulated=False)
    assert summary["refused"] == []
    assert summary["hash"] == expected


def _server(experiment: Experiment, place: Path) -> ExperimentContext:
    return ExperimentContext(experiment, place)


def test_a_node_with_the_wrong_side_is_told(paired: Any, tmp_path: Path) -> None:
    experiment = paired()
    whole = build_data(experiment)
    write_public(whole, tmp_path / "public.npz", answers=False, client=2)
    write_private(whole, 0, tmp_path / "private.npz")
    own = LocalShard(0, tmp_path / "private.npz", tmp_path / "public.npz")
    with pytest.raises(ConfigError, match="misses x_test_audio"):
        build_data(experiment, own=own)
    write_public(whole, tmp_path / "public.npz", answers=False, client=0)
    part = build_data(experiment, own=own)
    assert part.modality == "audio"
    assert part.shard(0).fingerprint() == whole.shard(0).fingerprint()
    with pytest.raises(ValueError, match="client 2 sees 'image', of which this machine has"):
        part.of(2)
    assert not ExperimentContext(experiment, own=own).has_student


# -- refusals ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["student.modality=smell"],
            "student.modality: 'smell' is none of data.transfer.pairs (audio, image)",
        ),
        (["student.modality=[]"], "student.modality: say which of data.transfer.pairs"),
        (["student.modality=[image, image]"], "one is named twice"),
        (["teachers.modality=null"], "teachers.modality: say which of data.transfer.pairs"),
        (["teachers.modality={0-1: audio}"], "client 2 sees nothing"),
        (["teachers.modality={0-2: audio, 2: image}"], "client 2 is named twice"),
        (["teachers.modality={0-5: audio}"], "there is no client 3"),
        (["teachers.modality={all: audio}"], "expected clients like 0-2 or 3,5, got 'all'"),
        (["data.transfer.pairs={}"], "teachers.modality: needs data.transfer.pairs"),
        (["data.transfer.pairs={audio: digits}"], "expected two modalities or more"),
        (["data.dataset=mnist"], "data.dataset: 'mnist' is not read"),
        (["data.transfer.dataset=digits"], "pairs of their own are read from npz"),
        (["teachers.feedback.use=align"], "teachers.feedback.use: 'align'"),
        (["teachers.feedback.use=regulariser"], "teachers.feedback.use: 'regulariser'"),
        (
            ["teachers.modality=audio", "evaluation.baselines=[ceiling]"],
            "'ceiling' trains the student on all private images",
        ),
    ],
)
def test_what_cannot_be_is_refused_when_it_is_read(
    paired: Any, words: list[str], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        paired(*words)
    assert message in str(caught.value)


@pytest.mark.parametrize("loss", ["vrm", "cat", "fitnet", "wkd_f", "ofd", "london", "sp"])
def test_losses_over_maps_and_views_are_refused_by_name(paired: Any, loss: str) -> None:
    with pytest.raises(ConfigError, match=rf"distillation\.losses\.1: loss '{loss}' compares"):
        ExperimentContext(paired(f"distillation.losses=[ce, {loss}]"))


def test_losses_over_logits_vectors_and_relations_are_not(paired: Any) -> None:
    losses = "[dkd, dist, rkd, cka, {name: sp, space: features}, {name: vrm, edges: real}]"
    ExperimentContext(paired(f"distillation.losses={losses}"))


def test_where_all_see_the_same_maps_may_be_compared(paired: Any) -> None:
    words = ["teachers.modality=image", "teachers.models=cnn_tiny", "distillation.losses=[ce, vrm]"]
    ExperimentContext(paired(*words))


def test_the_default_losses_are_such_that_can_be(paired: Any) -> None:
    values = {**PAIRS, "distillation": {"epochs": 2}, "evaluation": {}}
    experiment = make_experiment(values)
    assert [term.name for term in experiment.distillation.losses] == ["ce", "dkd"]
    assert experiment.evaluation.baselines == ("oracle", "ceiling")
    alone = make_experiment(values, ["teachers.modality=audio"])
    assert alone.evaluation.baselines == ("oracle",)


def test_other_classes_are_named(paired: Any) -> None:
    with pytest.raises(ConfigError, match=r"data\.transfer\.pairs: audio and image have different"):
        build_data(paired("data.transfer.pairs.audio.dataset.classes=5"))


def test_baselines_that_share_weights_or_images_are_refused() -> None:
    base = {k: v for k, v in PAIRS.items() if k not in ("name", "evaluation")}

    def study(*methods: str) -> CompareStudy:
        return CompareStudy(Comparison(experiment=base, methods=[{"name": m} for m in methods]))

    for name in BASELINES.names():
        if not getattr(BASELINES.get(name), "crosses_modalities", False):
            with pytest.raises(ConfigError, match=rf"methods\.{name}: baseline '{name}' shares"):
                study(name).check()
    study("fedkd", "pate_vote", "dsfl", "cfd").check()


@pytest.mark.parametrize("name", ["pate_vote", "dsfl", "cfd"])
def test_baselines_that_share_answers_teach_across_modalities(paired: Any, name: str) -> None:
    outcome = BASELINES.create(name).run(ExperimentContext(paired("rounds=1")), lambda _: None)
    assert outcome.predictions is not None
    assert outcome.holdouts[:2] == (None, None)
    assert outcome.holdouts[2] is not None


@pytest.mark.slow
def test_ray_reaches_the_student_of_the_local_runner(paired: Any, finished: RunDirectory) -> None:
    from fedkd.simulations.ray import run_ray

    assert student(run_ray(paired("evaluation.baselines=[oracle, ceiling]"))) == student(finished)
