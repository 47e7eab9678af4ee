"""Weights from local files: what fits, what is said, what is refused; and nothing is downloaded."""

import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fedkd.models.build import build_model, check_entry
from fedkd.models.network import Network

CLASSES = ("cat", "dog", "owl")
TINY_CLIP: dict[str, Any] = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 8, "width": 16, "heads": 2, "layers": 1},
}
CLIP = "open_clip/ViT-B-32"


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise AssertionError("something wants to download")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(socket.socket, "connect", refused)


def network(
    name: str,
    channels: int = 3,
    side: int = 8,
    *,
    seed: int = 0,
    more: dict[str, Any] | None = None,
    **options: Any,
) -> Network:
    return build_model(
        name,
        num_classes=len(CLASSES),
        in_channels=channels,
        image_size=side,
        mean=[0.4] * channels,
        std=[0.2] * channels,
        seed=seed,
        options=options,
        **(more or {}),
    )


def begun(
    path: Path, name: str, channels: int = 3, side: int = 8, whole: bool = False, **options: Any
) -> tuple[Network, str | None]:
    """A network with a file's weights, and what is said of them."""
    said: list[str] = []
    more = {"file": path, "classes": CLASSES, "whole": whole, "notify": said.append}
    made = network(name, channels, side, seed=7, more=more, weights=str(path), **options)
    return made, said[0] if said else None


def same(first: Network, second: Network) -> bool:
    ours, theirs = first.body.state_dict(), second.body.state_dict()
    return all(torch.equal(ours[key], theirs[key]) for key in ours)


def images(channels: int = 3, side: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    size = (4, channels, side, side)
    return torch.randint(256, size, generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("form", ["bare.pt", "whole.pt", "fedkd.pt", "bare.safetensors"])
def test_our_own_networks_begin_with_any_of_these_files(tmp_path: Path, form: str) -> None:
    saved, path = network("resnet8"), tmp_path / form
    saved.mean.fill_(0.25)
    if form.endswith("safetensors"):
        save_file(saved.body.state_dict(), path)
    else:
        about = {"model": "resnet8", "classes": list(CLASSES), "weights": saved.state_dict()}
        kinds = {"bare.pt": saved.body.state_dict(), "whole.pt": saved.state_dict()}
        torch.save(kinds.get(form, about), path)
    made, remark = begun(path, "resnet8")
    assert remark is None
    assert same(made, saved)
    # A whole network brings its own statistics, a body is shown those of the images.
    assert float(made.mean[0, 0]) == pytest.approx(0.4 if form.startswith("bare") else 0.25)


@pytest.mark.parametrize("classes", [7, 0])
def test_a_head_for_other_classes_is_replaced_and_that_is_said(
    tmp_path: Path, classes: int
) -> None:
    saved, path = network("resnet8", seed=1), tmp_path / "other.pt"
    state = saved.body.state_dict()
    head = {key: state.pop(key) for key in list(state) if key.startswith("head.")}
    if classes:
        state |= {key: torch.zeros(classes, *old.shape[1:]) for key, old in head.items()}
    torch.save(state, path)
    made, remark = begun(path, "resnet8")
    why = "its head head.weight is for 7 classes and not 3" if classes else "it has no head"
    assert remark == f"other.pt: {why}; resnet8 for 3 classes starts with a new head"
    assert torch.equal(made.body.head.weight, network("resnet8", seed=7).body.head.weight)
    rest = {key: t for key, t in made.body.state_dict().items() if not key.startswith("head.")}
    assert all(torch.equal(tensor, saved.body.state_dict()[key]) for key, tensor in rest.items())
    with pytest.raises(ValueError, match="does not fit resnet8 for 3 classes: "):
        begun(path, "resnet8", whole=True)


def test_a_head_for_other_names_is_another_head(tmp_path: Path) -> None:
    saved, path = network("resnet8"), tmp_path / "birds.pt"
    torch.save({"classes": ["jay", "tit", "owl"], "weights": saved.state_dict()}, path)
    assert "for other classes (jay, tit, owl" in str(begun(path, "resnet8")[1])
    with pytest.raises(ValueError, match="its head is for other classes"):
        begun(path, "resnet8", whole=True)


def test_the_first_three_mismatches_are_named(tmp_path: Path) -> None:
    path = tmp_path / "part.pt"
    state = dict(network("resnet8").body.state_dict())
    names = [key for key in state if key.endswith("weight")]
    state[names[0]] = state[names[0]][:4]
    for name in names[1:3]:
        del state[name]
    torch.save({**state, "odd": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=r"part\.pt does not fit resnet8 for 3 classes: ") as error:
        begun(path, "resnet8")
    text = str(error.value)
    assert f"{names[0]} is 4x3x3x3, expected 16x3x3x3; it has no '{names[1]}'" in text
    assert text.count("; ") == 3
    assert text.endswith("; ...")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"there is no file .* \(nothing is downloaded\)"),
        (b"not a pickle", "cannot read .*expected tensors"),
        ({"epoch": 3}, "holds no weights"),
        ({"a": torch.tensor([float("nan")])}, "a is not finite"),
        (torch.nn.Linear(2, 2), "cannot read .*expected tensors"),
    ],
)
def test_a_file_that_is_none_is_named(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "it.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(ValueError, match=message) as error:
        begun(path, "resnet8")
    assert "\n" not in str(error.value)


def test_a_cut_safetensors_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "cut.safetensors"
    save_file(network("mlp").body.state_dict(), path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"cannot read .*cut\.safetensors"):
        begun(path, "mlp")


def test_what_is_frozen_is_the_files(tmp_path: Path) -> None:
    saved, path = network("resnet8", seed=1), tmp_path / "it.pt"
    torch.save(saved.state_dict(), path)
    made, _ = begun(path, "resnet8", peft="head")
    assert same(made, saved)
    other, _ = begun(path, "resnet8", peft="head")
    other.load_state_dict(made.state_dict())  # the hashes of what is frozen agree
    torch.save(network("resnet8", seed=2).state_dict(), path)
    with pytest.raises(RuntimeError, match="belong to a frozen part"):
        begun(path, "resnet8", peft="head")[0].load_state_dict(made.state_dict())


# -- networks of other libraries -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "own", "channels"),
    [
        ("torchvision/shufflenet_v2_x0_5", {}, 1),
        ("timm/vit_tiny_patch16_224", {"img_size": 32, "depth": 1}, 3),
        ("timm/resnet10t", {}, 1),
        (CLIP, TINY_CLIP, 1),
        (CLIP, TINY_CLIP, 3),
    ],
)
def test_published_networks_see_images_as_they_were_published_for(
    tmp_path: Path, name: str, own: dict[str, Any], channels: int
) -> None:
    path = tmp_path / "it.pt"
    saved = build_model(  # with a head of other classes
        name,
        num_classes=5,
        in_channels=3,
        image_size=16,
        mean=[0.5] * 3,
        std=[0.5] * 3,
        options={"resize": "bicubic", **own},
    )
    torch.save(saved.body.state_dict(), path)
    made, remark = begun(path, name, channels, 8, **own)
    assert "is for 5 classes and not 3" in str(remark)
    side = own.get("img_size") or own.get("vision_cfg", {}).get("image_size", 224)
    side = 176 if name == "timm/resnet10t" else side
    assert made.resize == side
    assert made.channels == channels
    shown = made.normalise(images(channels))
    assert shown.shape == (4, 3, side, side)
    assert torch.equal(made.mean, saved.mean)
    pixels = images(channels).float().div(255).expand(-1, 3, -1, -1)
    expected = torch.nn.functional.interpolate(
        (pixels - made.mean) / made.std, side, mode="bicubic", antialias=True
    )
    torch.testing.assert_close(shown, expected)
    body = {key: t for key, t in made.body.state_dict().items() if made.head_name not in key}
    assert all(torch.equal(tensor, saved.body.state_dict()[key]) for key, tensor in body.items())
    assert made.eval()(images(channels)).shape == (4, 3)


def test_without_resizing_the_network_is_built_for_the_images(tmp_path: Path) -> None:
    name, options = "timm/vit_tiny_patch16_224", {"depth": 1, "patch_size": 4}
    saved, path = network(name, side=16, resize="none", **options), tmp_path / "it.pt"
    torch.save(saved.body.state_dict(), path)
    made, remark = begun(path, name, side=16, resize="none", **options)
    assert (made.resize, remark) == (None, None)
    assert made.mean.flatten().tolist() == [0.5, 0.5, 0.5]  # of the model, since it has a file
    assert saved.mean.flatten().tolist() == pytest.approx([0.4] * 3)
    with pytest.raises(ValueError, match=r"pos_embed is 1x17x192, expected 1x5x192"):
        begun(path, name, side=8, resize="none", **options)


def test_without_a_file_networks_are_built_for_the_images() -> None:
    for name, options in (("timm/resnet10t", {}), (CLIP, TINY_CLIP)):
        made = network(name, channels=1, side=32, **options)
        assert (made.resize, made.channels) == (None, 1)
        assert made.mean.flatten().tolist() == pytest.approx([0.4] * made.mean.numel())
        assert made(images(1, 32)).shape == (4, 3)


def test_prompts_make_a_classifier_of_100_cosines(tmp_path: Path) -> None:
    clip, path = tiny_clip(), tmp_path / "clip.safetensors"
    save_file(clip.state_dict(), path)
    prompts = ["a photo of a {}.", "a drawing of a {}."]
    made, remark = begun(path, CLIP, channels=1, prompts=prompts, **TINY_CLIP)
    assert remark is None
    texts = [p.replace("{}", name) for name in CLASSES for p in prompts]
    import open_clip

    tokens = open_clip.get_tokenizer("ViT-B-32", context_length=8)(texts)
    with torch.no_grad():
        words = clip.encode_text(tokens, normalize=True).view(3, 2, -1).mean(1)
        words = words / words.norm(dim=1, keepdim=True)
        seen = clip.encode_image(made.normalise(images(1)), normalize=True)
        logits = made.eval()(images(1))
        scale = float(clip.logit_scale.exp())
    torch.testing.assert_close(logits, scale * seen @ words.T, rtol=1e-4, atol=1e-4)
    own = {"cat": "a cat", "dog": ["a dog"], "owl": ["an owl", "a bird at night"]}
    begun(path, CLIP, prompts=own, **TINY_CLIP)
    with pytest.raises(ValueError, match="prompts: no text for class 'owl'"):
        begun(path, CLIP, prompts={"cat": "a", "dog": "b"}, **TINY_CLIP)
    tower = {k: v for k, v in clip.state_dict().items() if k.startswith("visual.")}
    save_file(tower, path)
    with pytest.raises(ValueError, match=r"does not fit .* it has no 'positional_embedding'"):
        begun(path, CLIP, prompts=prompts, **TINY_CLIP)
    assert "it has no head" in str(begun(path, CLIP, **TINY_CLIP)[1])


def tiny_clip() -> Any:
    from fedkd.data import vision

    assert vision.models  # before open_clip, which imports torchvision
    import open_clip

    config = open_clip.get_model_config("ViT-B-32")
    changed = {
        key: {**config[key], **value} if isinstance(value, dict) else value
        for key, value in TINY_CLIP.items()
    }
    torch.manual_seed(2)
    return open_clip.create_model("ViT-B-32", pretrained=None, load_weights=False, **changed).eval()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet8", {"weights": 3}, "weights: expected the path of a file, got 3"),
        ("resnet8", {"resize": "bicubic"}, "resize: model 'resnet8' has no size of its own"),
        ("timm/resnet10t", {"resize": "linear"}, "resize: expected bicubic or none"),
        ("timm/resnet10", {}, "unknown model 'timm/resnet10'; did you mean"),
        ("timm/hf_hub:some/body", {}, "unknown model"),
        ("open_clip/hf-hub:some/body", {}, "unknown model"),
        ("torchvision/resnet19", {}, "unknown model 'torchvision/resnet19'; did you mean"),
        ("resnet8", {"weights": "a.pt", "prompts": "a {}"}, "prompts: model 'resnet8' reads no"),
        (CLIP, {"prompts": "a {}"}, "prompts: .* set weights"),
        (CLIP, {"weights": "a.pt", "prompts": "a photo"}, "prompts: expected one {} for the name"),
        (CLIP, {"weights": "a.pt", "prompts": "{0.x}"}, "prompts: expected one {} for the name"),
        (CLIP, {"weights": "a.pt", "prompts": []}, "prompts: expected texts"),
        (
            "open_clip/ViT-B-16-SigLIP",
            {"weights": "a.pt", "prompts": "a {}"},
            "its tokenizer 'timm/ViT-B-16-SigLIP' would be downloaded",
        ),
    ],
)
def test_entries_that_cannot_be_are_refused_by_name(
    name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        check_entry(name, options)
    assert "\n" not in str(error.value)


def test_timm_finds_torchvision_behind_our_door_also_when_it_is_the_first_to_ask() -> None:
    code = "from fedkd.models.foundation import check_name; check_name('timm/resnet10t')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
