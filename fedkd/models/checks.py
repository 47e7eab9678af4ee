"""Whether a network fits the images it is to see, asked once, before work starts."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fedkd.models.head import find_classifier
from fedkd.models.network import Network
from fedkd.models.taps import evaluating, training
from fedkd.randomness import seeded

# What modules call the pixel statistics that they normalise with.
_STATISTICS = (("mean", "std"), ("pixel_mean", "pixel_std"), ("image_mean", "image_std"))


def one_line(error: Exception) -> str:
    """What others' code has raised, in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def check_network(network: Network, who: str, images: Tensor, classes: int, where: str) -> None:
    """Try a network on some images, and find its head where nobody has named one.

    Args:
        network: Left as it is, but for `head_name` and `final_name` if both are None.
        who: What it is called in messages, e.g. `teachers[0]`.
        images: Some of the images, uint8 (B, channels, h, w), B at least 1.
        classes: Number of classes.
        where: What the images are called in messages, e.g. `transfer`.

    Raises:
        ValueError: it takes other images or gives other logits, they are not finite, or its head
            is none.
    """
    name = f"{who} ({type(network.body).__name__})"
    channels, height, width = images.shape[1:]
    side = network.image_size
    size, takes = f"{channels}x{height}x{width}", network.channels
    if takes != channels or (side is not None and (height, width) != (side, side)):
        made = f"{takes}-channel" if side is None else f"{takes}x{side}x{side}"
        raise ValueError(f"{name} takes {made} images, {where} has {size} ones")
    example = images.to(network.mean.device)
    try:
        with seeded(0, "dry pass"), evaluating(network):
            outputs = network.read(example)
            found = find_classifier(network.body, network.normalise(example), network.head_name)
    except Exception as error:
        raise ValueError(
            f"{name} cannot take the {size} images of {where}: {one_line(error)}"
        ) from error
    _check_logits(outputs.logits, name, len(images), classes, where)
    if not outputs.logits.isfinite().all():
        raise ValueError(f"{name} gives logits that are nan or infinite for images of {where}")
    if found.fault is not None:
        raise ValueError(f"{name} has the head {network.head_name!r}, but {found.fault}")
    network.head_name = found.head
    network.final_name = network.final_name or found.final


def check_training(network: Network, who: str, images: Tensor, classes: int, where: str) -> None:
    """Try a network in training mode, where it may answer otherwise (auxiliary heads).

    Raises:
        ValueError: it does not give logits then, or it has nothing to train.
    """
    name = f"{who} ({type(network.body).__name__})"
    if not any(p.requires_grad for p in network.parameters()):
        raise ValueError(f"{name} has no parameter that could be trained")
    example = images.to(network.mean.device)
    if len(example) == 1:
        example = torch.cat([example, example])  # batch norm cannot train on one
    try:
        with seeded(0, "dry pass"), training(network):
            logits = network(example)
    except Exception as error:
        raise ValueError(f"{name} fails in training mode: {one_line(error)}") from error
    _check_logits(logits, f"{name} in training mode", len(example), classes, where)


def normaliser(body: nn.Module) -> str | None:
    """Which part of a module normalises the images that enter it, as far as one can see."""
    for name, module in body.named_modules():
        if isinstance(module, Network):
            return f"{name or 'it'} is a Network"
        if type(module).__name__ in ("Normalize", "Normalise") and _has(module, ("mean", "std")):
            return f"{name or 'it'} is {type(module).__name__}"
    for module in _entrance(body):
        for pair in _STATISTICS:
            if _has(module, pair):
                return f"{type(module).__name__} has {pair[0]} and {pair[1]}"
    return None


def _entrance(body: nn.Module) -> Iterator[nn.Module]:
    """The modules that are handed the images themselves: the body, and what a chain starts with."""
    yield body
    while isinstance(body, nn.Sequential) and len(body):
        body = body[0]
        yield body


def _has(module: nn.Module, names: tuple[str, str]) -> bool:
    """Whether it has these as tensors or lists of numbers, as statistics are."""
    values = [getattr(module, name, None) for name in names]
    return all(isinstance(value, Tensor | list | tuple) for value in values)


def _check_logits(logits: object, name: str, count: int, classes: int, where: str) -> None:
    if not isinstance(logits, Tensor):
        raise ValueError(f"{name} gives a {type(logits).__name__}, expected logits (B, {classes})")
    if logits.ndim == 2 and len(logits) == count and logits.shape[1] != classes:
        raise ValueError(
            f"{name} gives logits of {logits.shape[1]} classes, {where} has {classes} classes"
        )
    if tuple(logits.shape) != (count, classes):
        raise ValueError(
            f"{name} gives logits {tuple(logits.shape)} for {count} images, "
            f"expected {(count, classes)}"
        )
