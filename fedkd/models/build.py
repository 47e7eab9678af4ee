"""From a model's name (or a user's own module) to a tapped, checked `Network`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedkd.models import MODELS
from fedkd.models.network import Network
from fedkd.models.taps import evaluating, find_pooling, find_stages
from fedkd.models.torchvision_models import PREFIX, torchvision_model, torchvision_names
from fedkd.randomness import seeded


def model_names() -> list[str]:
    """All names `build_model` knows: ours, sorted, then `torchvision/...`."""
    return MODELS.names() + torchvision_names()


def build_model(
    model: str | nn.Module,
    *,
    num_classes: int,
    in_channels: int,
    image_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
) -> Network:
    """A network with its preprocessing and taps, tried on two black images.

    Args:
        model: A registered name (`resnet20`), a torchvision one (`torchvision/resnet18`), or a
            ready module that maps normalised images to logits. A module that declares no
            `stages` gets them from `find_stages`.
        num_classes: Width of the logits.
        in_channels: Channels of the images.
        image_size: Side of the images.
        mean: Per-channel mean of the pixels in [0, 1].
        std: Per-channel standard deviation of the pixels in [0, 1].
        seed: Run seed; the weights come from its stream `init/<name>` and the global
            generators stay untouched. A ready module keeps its weights.
        options: Keyword options of the named model.

    Raises:
        ValueError: unknown name or option, a model that cannot take such images, or logits of
            another shape than (2, num_classes).
    """
    name = model if isinstance(model, str) else type(model).__name__
    for key, values in (("mean", mean), ("std", std)):
        if len(values) != in_channels:
            raise ValueError(f"{key}: expected {in_channels} values, got {len(values)}")
    with seeded(seed, "init", name):
        body = _body(model, num_classes, in_channels, image_size, options or {})
        parameter = next(body.parameters(), torch.empty(0))
        images = torch.zeros(2, in_channels, image_size, image_size, device=parameter.device)
        size = f"{in_channels}x{image_size}x{image_size}"
        try:
            stages = _declared_stages(body)
            if stages is None:
                stages = find_stages(body, images)
            final = getattr(body, "final_name", None) or find_pooling(body)
            with evaluating(body):
                logits: object = body(images)
        # Whatever the foreign code raises, the user needs to hear which model it was.
        except Exception as error:
            raise ValueError(f"model {name!r} cannot take {size} images: {error}") from error
    shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if shape != (2, num_classes):
        raise ValueError(
            f"model {name!r}: expected logits {(2, num_classes)} for two {size} images, got {shape}"
        )
    network = Network(body, mean=mean, std=std, stages=stages, final=final)
    return network.to(parameter.device)


def _body(
    model: str | nn.Module,
    num_classes: int,
    in_channels: int,
    image_size: int,
    options: Mapping[str, Any],
) -> nn.Module:
    if isinstance(model, Network):
        raise ValueError("model: expected a module that takes normalised images, got a Network")
    if isinstance(model, nn.Module):
        if options:
            raise ValueError(f"model: a ready module takes no options, got {dict(options)}")
        return model
    if model.startswith(PREFIX):
        return torchvision_model(model, num_classes, in_channels, image_size, options)
    return MODELS.create(model, num_classes, in_channels, image_size, **options)


def _declared_stages(body: nn.Module) -> tuple[str, ...] | None:
    """`body.stages` if it is a list of names: in others' code it may be a list of modules."""
    stages = getattr(body, "stages", None)
    if isinstance(stages, (list, tuple)) and all(isinstance(name, str) for name in stages):
        return tuple(stages)
    return None
