"""The one door to timm and open_clip: architectures by their own names, never their weights.

Both are imported when first asked for, behind fedkd's door to torchvision, which they import
themselves. Nothing is downloaded: only names that the libraries list are taken, without weights.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedkd.io.extras import extra
from fedkd.io.text import nearest
from fedkd.models.preparation import Preparation

TIMM, OPEN_CLIP = "timm/", "open_clip/"


class ImageTower(nn.Module):
    """The image encoder of a CLIP and a linear head.

    Args:
        visual: Normalised images -> features (B, D).
        width: D.
        num_classes: Width of the logits.
        unit: Compare directions, as CLIP does: the head sees features of length one and has no
            bias, so that text embeddings times 100 as its weights give logits 100 cos.
    """

    head_name = "head"

    def __init__(self, visual: nn.Module, width: int, num_classes: int, *, unit: bool) -> None:
        super().__init__()
        self.visual = visual
        self.unit = unit
        self.head = nn.Linear(width, num_classes, bias=not unit)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, C) of normalised images (B, 3, h, w)."""
        found = self.visual(images)
        features = found[0] if isinstance(found, tuple) else found
        logits: Tensor = self.head(
            functional.normalize(features, dim=-1) if self.unit else features
        )
        return logits


def foundation_names(prefix: str) -> list[str]:
    """`timm/beit_base_patch16_224`, ..., or `open_clip/ViT-B-32`, ..., sorted.

    Raises:
        MissingExtra: the library is not installed.
    """
    names = _timm().list_models() if prefix == TIMM else _open_clip().list_models()
    return sorted(prefix + name for name in names)


def check_name(name: str) -> None:
    """Raise `ValueError` unless the library lists the model."""
    known = foundation_names(TIMM if name.startswith(TIMM) else OPEN_CLIP)
    if name not in known:
        raise ValueError(f"unknown model {name!r}{nearest(name, known)} (see its library's list)")


def timm_model(
    name: str,
    num_classes: int,
    in_channels: int,
    image_size: int,
    options: Mapping[str, Any],
    *,
    own: bool,
) -> tuple[nn.Module, Preparation]:
    """An untrained timm classifier, and how the images it is published for are prepared.

    Args:
        name: With its prefix, e.g. `timm/vit_tiny_patch16_224`.
        num_classes: Width of the logits.
        in_channels: Channels of the images.
        image_size: Side of the images.
        options: Passed to timm, e.g. `{"drop_path_rate": 0.1}`.
        own: Build it for images of its own size instead of these.

    Raises:
        ValueError: unknown name or option, or a size the architecture cannot be built for.
    """
    check_name(name)
    given = {"num_classes": num_classes, "in_chans": in_channels, **options}
    make, short = _timm().create_model, name.removeprefix(TIMM)

    def built(**more: Any) -> nn.Module:
        module: nn.Module = make(short, pretrained=False, **{**more, **given})
        return module

    with named_errors(name):
        if own or "img_size" in options:
            body = built()
        else:
            try:
                body = built(img_size=image_size)
            except TypeError as error:
                if "img_size" not in str(error):
                    raise
                body = built()  # takes images of any size
    facts = getattr(body, "pretrained_cfg", None) or {}
    side = options.get("img_size") or facts.get("input_size", (3, 224, 224))[-1]
    return body, Preparation(int(side), tuple(facts["mean"]), tuple(facts["std"]))


def open_clip_model(
    name: str,
    num_classes: int,
    image_size: int,
    options: Mapping[str, Any],
    *,
    own: bool,
    unit: bool,
) -> tuple[nn.Module, Preparation]:
    """The untrained image encoder of a CLIP with a linear head.

    Args:
        name: With its prefix, e.g. `open_clip/ViT-B-32`.
        num_classes: Width of the logits.
        image_size: Side of the images.
        options: Change its config, e.g. `{"vision_cfg": {"layers": 6}}`.
        own: Build it for images of its own size instead of these.
        unit: As in `ImageTower`.

    Raises:
        ValueError: unknown name or option, or a size the architecture cannot be built for.
    """
    clip = _clip(name, options, None if own else image_size)
    visual = clip.visual
    facts = visual.preprocess_cfg
    size = facts["size"]
    side = size if isinstance(size, int) else size[-1]
    width = int(_output_width(name, visual, side))
    preparation = Preparation(side, tuple(facts["mean"]), tuple(facts["std"]))
    return ImageTower(visual, width, num_classes, unit=unit), preparation


def zero_shot(
    name: str,
    options: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    texts: Sequence[Sequence[str]],
) -> dict[str, Tensor]:
    """Weights of an `ImageTower` that compares images with texts.

    Args:
        name: As in `open_clip_model`.
        options: Likewise.
        weights: Of both encoders, with names as open_clip saves them.
        texts: Of each class, some; their embeddings are averaged.

    Returns:
        `visual.*`, and `head.weight` (C, D): unit embeddings times the scale of the logits, which
        is 100 in every published model.

    Raises:
        ValueError: the weights are not those of this model, or its texts cannot be read here.
    """
    clip = _clip(name, options, None)
    ours = clip.state_dict()
    wrong = [
        f"it has no {key!r}"
        if key not in weights
        else f"{key} is {tuple(weights[key].shape)}, expected {tuple(tensor.shape)}"
        for key, tensor in ours.items()
        if key not in weights or weights[key].shape != tensor.shape
    ]
    wrong += [f"it has {key!r}, which the model has not" for key in weights if key not in ours]
    if wrong:
        more = "; ..." if len(wrong) > 3 else ""
        raise ValueError(f"{'; '.join(wrong[:3])}{more}")
    clip.load_state_dict(dict(weights))
    clip.eval()
    with named_errors(name):
        length = getattr(clip, "context_length", None)
        tokenizer = _open_clip().get_tokenizer(name.removeprefix(OPEN_CLIP), context_length=length)
    with torch.no_grad():
        means = [
            clip.encode_text(tokenizer(list(some)), normalize=True).float().mean(0)
            for some in texts
        ]
        scale = clip.logit_scale.exp().clamp(max=100)
        head = scale * functional.normalize(torch.stack(means), dim=-1)
    image = {key: tensor for key, tensor in clip.state_dict().items() if key.startswith("visual.")}
    return {**image, "head.weight": head}


def reads_texts(name: str, options: Mapping[str, Any]) -> str | None:
    """Why a model's texts cannot be read without a download; None if they can."""
    text = _config(name, options).get("text_cfg", {})
    for key in ("hf_tokenizer_name", "hf_model_name"):
        if text.get(key):
            return f"its tokenizer {text[key]!r} would be downloaded"
    return None


def _clip(name: str, options: Mapping[str, Any], image_size: int | None) -> Any:
    check_name(name)
    with named_errors(name), _quiet():
        return _open_clip().create_model(
            name.removeprefix(OPEN_CLIP),
            pretrained=None,
            load_weights=False,
            pretrained_image=False,
            pretrained_text=False,
            **_changed(name, options, image_size),
        )


def _config(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The model's config, with options in place of its values, also of those within its parts."""
    config: dict[str, Any] = _open_clip().get_model_config(name.removeprefix(OPEN_CLIP))
    for key, value in options.items():
        old = config.get(key)
        config[key] = (
            {**old, **value} if isinstance(old, dict) and isinstance(value, Mapping) else value
        )
    return config


def _changed(name: str, options: Mapping[str, Any], image_size: int | None) -> dict[str, Any]:
    """The parts of the config that are not the model's own."""
    config = _config(name, options)
    changed = {key: config[key] for key in options}
    if image_size is not None:
        changed["vision_cfg"] = {**config["vision_cfg"], "image_size": image_size}
    return changed


def _output_width(name: str, visual: nn.Module, side: int) -> int:
    with torch.no_grad(), named_errors(name):
        was = visual.training
        found = visual.eval()(torch.zeros(1, 3, side, side))
        visual.train(was)
    features: Tensor = found[0] if isinstance(found, tuple) else found
    return features.shape[-1]


@contextmanager
def named_errors(name: str) -> Iterator[None]:
    """Name the model in whatever its library raises."""
    try:
        yield
    except (TypeError, ValueError, RuntimeError, AssertionError, OSError, KeyError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"model {name!r} cannot be built: {reason}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without open_clip's warning that there are no weights, which is what was asked for."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)


def _timm() -> Any:
    with extra("foundation", "a model `timm/...`"):
        import fedkd.data.vision  # noqa: F401  first, since timm imports torchvision # isort: skip
        import timm
    return timm


def _open_clip() -> Any:
    with extra("foundation", "a model `open_clip/...`"):
        import fedkd.data.vision  # noqa: F401  first, since open_clip imports torchvision # isort: skip
        import open_clip
    return open_clip
