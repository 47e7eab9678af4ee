"""Classifiers in local folders, as transformers' and timm's `save_pretrained` writes them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fedkd.data.vision  # noqa: F401  (transformers and timm import torchvision)
from fedkd.config import ConfigError
from fedkd.models.build import build_model
from fedkd.models.entries import files_of, place_of
from fedkd.models.network import Network
from fedkd.privacy.policy import PolicyRefused, check_config
from fedkd.rounds import ExperimentContext
from fedkd.simulations.local import run_local
from tests.conftest import Tiny
from tests.simulations.test_policy import strictest

CLASSES = ("cat", "dog", "owl", "fox")
MEAN = [0.1, 0.2, 0.3]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `vit` and `cnn` of transformers and `tenth` of timm."""
    import timm
    from timm.models._hub import save_for_hf
    from transformers import (
        ResNetConfig,
        ResNetForImageClassification,
        ViTConfig,
        ViTForImageClassification,
    )

    root = tmp_path_factory.mktemp("hub")
    torch.manual_seed(1)
    names = dict(enumerate(CLASSES))
    vit = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        image_size=16, patch_size=4, id2label=names, label2id={v: k for k, v in names.items()},
    )  # fmt: skip
    cnn = ResNetConfig(
        num_channels=1, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic",
        num_labels=4,
    )  # fmt: skip
    ViTForImageClassification(vit).save_pretrained(root / "vit")
    said = {"image_mean": MEAN, "image_std": [0.5] * 3, "size": {"height": 16, "width": 16}}
    (root / "vit" / "preprocessor_config.json").write_text(json.dumps(said))
    ResNetForImageClassification(cnn).save_pretrained(root / "cnn")
    save_for_hf(timm.create_model("resnet10t", num_classes=4), root / "tenth")
    return root


def begun(root: Path, name: str, classes: tuple[str, ...] = CLASSES, **options: Any) -> Network:
    remarks: list[str] = []
    network = build_model(
        name, num_classes=len(classes), in_channels=1, image_size=8, mean=[0.4], std=[0.2],
        options=options, file=place_of(name, options, root), root=root, classes=classes,
        notify=remarks.append,
    )  # fmt: skip
    network.remarks = remarks  # type: ignore[assignment]
    return network.eval()


def test_a_folder_gives_architecture_weights_size_and_statistics(folders: Path) -> None:
    from transformers import AutoModelForImageClassification

    network = begun(folders, "hf/vit")
    assert (network.resize, network.channels, network.remarks) == (16, 1, [])
    assert network.mean.flatten().tolist() == pytest.approx(MEAN)
    assert network.head is not None
    images = torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8)
    theirs = AutoModelForImageClassification.from_pretrained(folders / "vit").eval()
    with torch.no_grad():
        expected = theirs(pixel_values=network.normalise(images)).logits
        torch.testing.assert_close(network(images), expected)
    assert network.read(images).pooled.shape == (3, 16)
    other = begun(folders, "hf/vit", ("a", "b", "c"))
    assert other.remarks[0].endswith("hf/vit for 3 classes starts with a new head")
    adapted = begun(folders, "hf/vit", peft={"method": "lora", "r": 2})
    with torch.no_grad():
        assert torch.equal(adapted.eval()(images), network(images))


def test_folders_of_grey_images_and_of_timm(folders: Path) -> None:
    grey = begun(folders, "hf/cnn", mean=[0.3], std=[0.2])
    assert (grey.channels, grey.mean.numel(), grey.stage_names != ()) == (1, 1, True)
    tenth = begun(folders, "hf/tenth")
    assert tenth.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    assert (tenth.resize, tenth.remarks) == (176, [])
    plain = begun(folders, "hf/tenth", resize="none")
    assert plain.resize is None
    assert set(files_of("hf/vit", {}, folders)) == {
        "vit/config.json",
        "vit/preprocessor_config.json",
        "vit/model.safetensors",
    }


def _cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:500])


@pytest.mark.parametrize(
    ("name", "options", "change", "message"),
    [
        ("hf/", {}, None, "expected hf/ and a local folder"),
        ("hf/nowhere", {}, None, r"nowhere has no config\.json; expected a folder as save_pretr"),
        ("hf/cnn", {}, None, "does not say how images are normalised .*; set mean and std"),
        ("hf/vit", {"weights": "a.pt"}, None, "weights: the folder has its own; take weights out"),
        ("hf/vit", {"hidden_siz": 3}, None, "its config has no 'hidden_siz'; did you mean 'hid"),
        ("hf/vit", {"hidden_size": 32}, None, "does not fit hf/vit .* expected"),
        ("hf/vit", {"resize": "none"}, None, "does not fit hf/vit .*position_embeddings"),
        ("hf/vit", {}, _cut, r"cannot read .*model\.safetensors"),
        ("hf/vit", {}, lambda f: (f / "model.safetensors").unlink(), r"has no model\.safetensors"),
        ("hf/vit", {}, lambda f: (f / "config.json").write_text("[]"), "expected a mapping, got"),
        ("hf/vit", {}, lambda f: (f / "config.json").write_text("{}"), "cannot be built"),
        (
            "hf/vit",
            {},
            lambda f: (f / "config.json").write_text('{"auto_map": {"AutoConfig": "a.B"}}'),
            "cannot be built",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_name(
    folders: Path,
    tiny: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    options: dict[str, Any],
    change: Callable[[Path], object] | None,
    message: str,
) -> None:
    import shutil

    shutil.copytree(folders, tmp_path / "hub")
    if change is not None:
        change(tmp_path / "hub" / name.removeprefix("hf/"))
    monkeypatch.setenv("FEDKD_DATA", str(tmp_path / "hub"))
    with pytest.raises(ConfigError, match=message):
        ExperimentContext(tiny(f"student.model={json.dumps({'name': name, **options})}"))


@pytest.mark.slow
def test_a_run_with_folders_for_teachers_and_student(
    folders: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDKD_DATA", str(folders))
    entry = "{name: hf/cnn, mean: [0.3], std: [0.3]}"
    words = ("rounds=1", "evaluation.baselines=[]", "fusion=uniform", "distillation.losses=[kd]")
    own = tiny(f"teachers.models=[{entry}]", f"student.model={entry}", *words)
    run = run_local(own)
    assert {"weights cnn/config.json", "weights cnn/model.safetensors"} <= set(
        run.read_json("versions.json")
    )
    policy = strictest(own)
    outside = tiny(f"teachers.models=[{entry.replace('cnn', '../cnn')}]", *words)
    models = (*outside.teachers.models, outside.student.model)
    with pytest.raises(PolicyRefused, match="reads files below its own data-root only"):
        check_config(policy.model_copy(update={"models": models}), outside)
