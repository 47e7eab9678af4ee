"""From a model's name (or a user's own module) to a tapped, checked `Network`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedkd.models import MODELS
from fedkd.models.checks import normaliser, one_line
from fedkd.models.head import find_classifier
from fedkd.models.network import Network, declared, declared_stages, shown
from fedkd.models.peft import Peft, adapt
from fedkd.models.taps import evaluating, find_stages
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
            `stages` gets them from `find_stages`; the head is found by `find_classifier`.
        num_classes: Width of the logits.
        in_channels: Channels of the images.
        image_size: Side of the images.
        mean: Per-channel mean of the pixels in [0, 1].
        std: Per-channel standard deviation of the pixels in [0, 1].
        seed: Run seed; the weights come from its stream `init/<name>` and the global
            generators stay untouched. A ready module keeps its weights. What `peft` freezes is
            the same for every seed.
        options: Keyword options of the named model, and `peft`: what of it learns (a
            `fedkd.models.peft.Peft`, or its options).

    Raises:
        ValueError: unknown name or option, a model that cannot take such images, logits of
            another shape than (2, num_classes), a declared head that is none, or a module that
            normalises the images itself.
    """
    if not isinstance(model, str | nn.Module):
        hint = "; make one, e.g. Model()" if isinstance(model, type) else ""
        raise ValueError(f"model: expected a name or a torch.nn.Module, got {shown(model)}{hint}")
    name = model if isinstance(model, str) else type(model).__name__
    options = dict(options or {})
    peft = peft_of(name, options)
    for key, values in (("mean", mean), ("std", std)):
        if len(values) != in_channels:
            raise ValueError(f"{key}: expected {in_channels} values, got {len(values)}")
    with seeded(seed if peft is None else 0, "init", name):
        body = _body(model, num_classes, in_channels, image_size, options)
        parameter = next(body.parameters(), torch.empty(0))
        images = torch.zeros(2, in_channels, image_size, image_size, device=parameter.device)
        size = f"{in_channels}x{image_size}x{image_size}"
        try:
            stages = declared_stages(body)
            if stages is None:
                stages = find_stages(body, images)
            with evaluating(body):
                logits: object = body(images)
            found = find_classifier(body, images, declared(body, "head_name"))
        # Whatever the foreign code raises, the user needs to hear which model it was.
        except Exception as error:
            raise ValueError(
                f"model {name!r} cannot take {size} images: {one_line(error)}"
            ) from error
    shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if shape != (2, num_classes):
        raise ValueError(
            f"model {name!r}: expected logits {(2, num_classes)} for two {size} images, got {shape}"
        )
    if found.fault is not None:
        head = declared(body, "head_name")
        raise ValueError(f"model {name!r} declares the head {head!r}, but {found.fault}")
    network = Network(
        body,
        mean=mean,
        std=std,
        stages=stages,
        head=found.head,
        final=declared(body, "final_name") or found.final,
        image_size=image_size,
    )
    network.to(parameter.device)
    if peft is not None:
        try:
            adapt(network, peft, seed=seed)
        except ValueError as error:
            raise ValueError(f"model {name!r}: peft: {error}") from None
    return network


def peft_of(name: str, options: dict[str, Any]) -> Peft | None:
    """What of a model learns, taken out of its options; None: all. Raises `ValueError`."""
    given = options.pop("peft", None)
    try:
        return None if given is None else Peft.of(given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"model {name!r}: peft: {error}") from None


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
        twice = normaliser(model)
        if twice is not None:
            zeros, ones = [0.0] * in_channels, [1.0] * in_channels
            raise ValueError(
                f"model: {type(model).__name__} normalises images itself ({twice}), they would be "
                "normalised twice; take that out, or keep it with "
                f"fedkd.Network(model, mean={zeros}, std={ones})"
            )
        return model
    if model.startswith(PREFIX):
        return torchvision_model(model, num_classes, in_channels, image_size, options)
    try:
        return MODELS.create(model, num_classes, in_channels, image_size, **options)
    except (RuntimeError, MemoryError, ArithmeticError, IndexError) as error:
        if not options:
            raise
        given = ", ".join(f"{key}={value!r}" for key, value in options.items())
        raise ValueError(
            f"model {model!r} cannot be built with {given}: {one_line(error)[:200]}"
        ) from None
