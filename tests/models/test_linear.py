"""Linear classifiers on features that are not trained: patches of public images, a file's body."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fedkd.config import ConfigError
from fedkd.data.images import ImageSet
from fedkd.models.build import check_entry
from fedkd.models.linear import Frozen, Patches
from fedkd.models.network import Network
from fedkd.models.taps import training
from fedkd.privacy import dp_sgd
from fedkd.privacy.clipping import Clipping
from fedkd.privacy.dp_sgd import Mechanism, fit_private, fit_private_many
from fedkd.privacy.model_check import check_private
from fedkd.privacy.policy import PolicyRefused, check_config
from fedkd.rounds import ExperimentContext
from fedkd.runs.directory import RunDirectory
from fedkd.runs.export import load_student
from fedkd.simulations.local import run_local
from fedkd.training.optimizers import Optimizer
from tests.conftest import Tiny
from tests.models.built import built
from tests.simulations.test_policy import strictest
from tests.simulations.test_weights_in_runs import saved

PATCHES = {"directions": 6, "features": {"name": "patches", "centres": 8}}


def public(count: int = 40) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (count, 1, 8, 8), generator=generator).to(torch.uint8)


@pytest.fixture
def body(tmp_path: Path) -> Path:
    """A network with batch norm, trained elsewhere."""
    network = built("cnn_tiny", classes=4, options={"norm": "batch"})
    with training(network):
        network(public())  # moves its statistics
    torch.save(network.state_dict(), tmp_path / "body.pt")
    return tmp_path / "body.pt"


def on_body(path: Path, images: Tensor | None = None) -> Network:
    entry = {"name": "cnn_tiny", "norm": "batch", "weights": path.name}
    return built(
        "linear", classes=4, options={"directions": 6, "features": entry}, file=path,
        public=public() if images is None else images,
    )  # fmt: skip


def on_patches(images: Tensor | None = None) -> Network:
    seen = public() if images is None else images
    return built("linear", classes=4, options=PATCHES, public=seen)


def test_a_feature_is_how_near_the_patches_of_a_quarter_come_to_a_typical_one() -> None:
    reader = Patches(1, 8, 8)
    reader.see(public())
    pixels = public(3).float() / 255
    found = reader(pixels).view(3, 8, 2, 2)
    total = torch.zeros(3, 8)
    for row in range(3):  # of six places, the first three are in the upper quarters
        for column in range(3):
            patch = pixels[:, 0, row : row + 3, column : column + 3].flatten(1)
            centred = patch - patch.mean(1, keepdim=True)
            scaled = centred / (centred.square().mean(1, keepdim=True) + (10 / 255) ** 2).sqrt()
            white = (scaled - reader.shift) @ reader.whitening
            distances = torch.stack([(white - c).norm(dim=1) for c in reader.centres], 1)
            total += (distances.mean(1, keepdim=True) - distances).clamp(min=0)
    assert torch.allclose(found[:, :, 0, 0], total / 9, atol=1e-4)


def test_typical_patches_are_the_same_for_every_client_and_travel_with_the_network() -> None:
    first, other = on_patches(), on_patches(public().clone())
    assert all(torch.equal(t, other.state_dict()[k]) for k, t in first.state_dict().items())
    nn.init.normal_(first.body.head.weight)
    again = on_patches(torch.empty(0, 1, 8, 8, dtype=torch.uint8))
    again.load_state_dict(first.state_dict())
    assert torch.equal(again(public(5)), first(public(5)))
    assert sum(p.numel() for p in first.parameters() if p.requires_grad) == 6 * 4


def test_a_body_from_a_file_is_read_as_it_is_and_stays_so(body: Path) -> None:
    network, alone = on_body(body), built("cnn_tiny", classes=4, options={"norm": "batch"})
    alone.load_state_dict(torch.load(body))
    reader = network.body.reader
    assert isinstance(reader, Frozen)
    pooled = alone.eval().read(public(5)).pooled
    assert torch.allclose(reader(public(5).float() / 255), pooled, atol=1e-6)
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    network.train()(public())
    assert all(torch.equal(before[key], t) for key, t in network.state_dict().items())
    assert [p.shape for p in network.parameters() if p.requires_grad] == [(4, 6)]


@pytest.mark.parametrize("clipping", ["hooks", "ghost"])
def test_they_are_private(body: Path, clipping: Clipping) -> None:
    check_private(on_patches(), (1, 8, 8), 4, clipping=clipping)
    check_private(on_body(body), (1, 8, 8), 4, clipping=clipping)


def test_a_body_that_learns_is_not_private(body: Path) -> None:
    network = on_body(body).requires_grad_(True)
    with pytest.raises(ValueError, match=r"reader\.network\.body\.\S+ \(BatchNorm2d\) mixes"):
        check_private(network, (1, 8, 8), 4)


@pytest.mark.parametrize("kind", ["patches", "body"])
def test_features_that_are_read_once_give_the_training_that_reads_them_in_every_step(
    body: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    several = [on_patches() if kind == "patches" else on_body(body) for _ in range(3)]
    shard = ImageSet(public(30), torch.arange(30) % 4, tuple("abcd"))
    mechanism = Mechanism(
        0.5, 15.0, steps=4, noise_multiplier=0.5, max_grad_norm=0.8, physical_batch=6
    )
    how = {"optimizer": Optimizer(name="sgd", lr=1.0)}
    read = []
    monkeypatch.setattr(dp_sgd, "_features", lambda *a, f=dp_sgd._features: read.append(1) or f(*a))
    fit_private(several[0], shard, mechanism, seed=1, noise_seed=2, **how)
    errors = fit_private_many(
        several[1:2], [shard], mechanism, seeds=[1], noise_seeds=[2], together=True, **how
    )
    assert (errors, len(read)) == ([None], 2)
    monkeypatch.setattr(dp_sgd, "_only_head", lambda teacher: None)
    fit_private(several[2], shard, mechanism, seed=1, noise_seed=2, **how)
    weights = [network.body.head.weight.detach() for network in several]
    assert weights[2].abs().max() > 0.1
    assert torch.equal(weights[0], weights[1])
    assert torch.allclose(weights[0], weights[2], atol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"features": "pixel"}, "features: unknown model 'pixel'"),
        ({"features": {"name": "pixels", "centres": 3}}, "pixels have no options"),
        ({"features": {"name": "patches", "size": 3}}, "patches have one option, centres"),
        ({"features": {"centres": 3}}, "features: expected pixels, patches, or a network"),
        ({"features": "cnn_tiny"}, "'cnn_tiny' would stay at its random weights"),
        (
            {"features": {"name": "cnn_tiny", "weights": "a.pt", "wide": 3}},
            "features: model 'cnn_tiny' has no option 'wide'",
        ),
        (
            {"features": {"name": "cnn_tiny", "weights": "a.pt", "peft": "head"}},
            "without peft and prompts",
        ),
        ({"features": {"name": "linear", "weights": "a.pt"}}, "a network of ours"),
        (
            {"features": {"name": "cnn_tiny", "weights": "a.pt"}, "weights": "b.pt"},
            "name them in features",
        ),
    ],
)
def test_features_that_there_are_not_are_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_entry("linear", options)


def test_what_images_and_file_cannot_give_is_refused(tmp_path: Path, body: Path) -> None:
    with pytest.raises(ValueError, match=r"linear.*directions: 40 public images of 32 numbers"):
        built("linear", options={**PATCHES, "directions": 33}, public=public())
    with pytest.raises(ValueError, match=r"centres: expected at least 2, got 1"):
        built("linear", options={"features": {"name": "patches", "centres": 1}}, public=public())
    with pytest.raises(ValueError, match=r"'linear': features: there is no file .*none\.pt"):
        on_body(tmp_path / "none.pt")


DP = (
    "teachers.privacy={epsilon: 8.0, delta: 0.001, nominal_size: 40}",
    "fusion=[entropy]",
    "evaluation.clients=false",
    "evaluation.baselines=[oracle]",
    "distillation.losses=[ce]",
    "rounds=1",
)


def test_a_private_run_on_a_file_says_what_its_features_are(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDKD_DATA", str(tmp_path))
    saved(tiny(), "cnn_tiny", tmp_path / "net.pt")
    entry = "{name: linear, directions: 8, features: {name: cnn_tiny, weights: net.pt}}"
    experiment = tiny(f"teachers.models=[{entry}]", f"student.model={entry}", *DP)
    run = run_local(experiment)
    facts = run.read_json("privacy.json")
    assert "a linear layer on features of cnn_tiny (net.pt)" in facts["how"]
    assert "the frozen weights show no private images" in facts["assumes"]
    assert "weights net.pt" in run.read_json("versions.json")
    (tmp_path / "net.pt").unlink()  # the student carries its body along
    assert load_student(RunDirectory.open(run.path)).body.reader.width == 24
    with pytest.raises(ConfigError, match=r"'linear': features: there is no file"):
        ExperimentContext(experiment)


def test_a_node_reads_no_body_from_elsewhere(tiny: Tiny) -> None:
    entry = "{name: linear, features: {name: cnn_tiny, weights: ../net.pt}}"
    experiment = tiny(f"teachers.models=[{entry}]", *DP)
    models = (*experiment.teachers.models, experiment.student.model)
    policy = strictest(tiny()).model_copy(update={"models": models})
    with pytest.raises(PolicyRefused, match=r"cnn_tiny with weights '\.\./net\.pt'"):
        check_config(policy, experiment)
