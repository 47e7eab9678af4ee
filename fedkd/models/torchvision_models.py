"""Any torchvision classifier by its own name, behind the prefix `torchvision/`.

torchvision is imported when first asked for: it costs seconds that a run with our own networks
need not spend.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from fedkd.io.text import nearest
from fedkd.models.preparation import Preparation

PREFIX = "torchvision/"

# Options of torchvision that cannot be right here.
_REFUSED = {
    "num_classes": "the images decide it",
    "transform_input": "images would be normalised twice",
}


def torchvision_names() -> list[str]:
    """`torchvision/alexnet`, `torchvision/convnext_base`, ..., sorted."""
    from fedkd.data.vision import models

    names: list[str] = models.list_models(module=models)  # type: ignore[attr-defined]
    return [PREFIX + name for name in sorted(names)]


def torchvision_model(
    name: str,
    num_classes: int,
    in_channels: int,
    image_size: int,
    options: Mapping[str, Any],
    *,
    own: bool = False,
) -> tuple[nn.Module, Preparation]:
    """An untrained torchvision classifier, and how the images it is published for are prepared.

    Args:
        name: With its prefix, e.g. `torchvision/resnet18`.
        num_classes: Width of the logits.
        in_channels: Channels of the images; other than 3 replaces the first convolution.
        image_size: Side of the images; transformers are built for it.
        options: Passed to torchvision, e.g. `{"dropout": 0.2}`.
        own: Build it for images of its own size instead of these.

    Raises:
        ValueError: unknown name or option, or a size the architecture cannot be built for.
    """
    from fedkd.data.vision import models

    known = torchvision_names()
    if name not in known:
        raise ValueError(f"unknown model {name!r}{nearest(name, known)} (see `fedkd list models`)")
    for option, reason in _REFUSED.items():
        if options.get(option):
            raise ValueError(f"model {name!r}: option {option!r} cannot be set: {reason}")
    short = name.removeprefix(PREFIX)
    preparation = _preparation(short)
    side = preparation.side if own else image_size
    arguments: dict[str, Any] = {"num_classes": num_classes, **_defaults(short, side)}
    try:
        make = models.get_model_builder(short)  # type: ignore[attr-defined]
        body: nn.Module = make(**{"weights": None, **arguments, **options})
    except TypeError as error:
        raise ValueError(f"model {name!r}: {error} (options: {dict(options)})") from error
    except (ValueError, RuntimeError, AssertionError) as error:
        raise ValueError(
            f"model {name!r} cannot be built for {side}x{side} images: {error}"
        ) from error
    if in_channels != 3:
        _replace_first_convolution(name, body, in_channels)
    return body, preparation


def _preparation(short: str) -> Preparation:
    from fedkd.data.vision import models

    facts = models.get_model_weights(short)["DEFAULT"].transforms()  # type: ignore[attr-defined]
    mean, std = tuple(facts.mean), tuple(facts.std)
    if short in ("googlenet", "inception_v3"):
        # Published with `transform_input`: what their layers see is this.
        mean = std = (0.5, 0.5, 0.5)
    return Preparation(int(facts.crop_size[0]), mean, std)


def _defaults(short: str, image_size: int) -> dict[str, Any]:
    if short in ("googlenet", "inception_v3"):
        # Auxiliary heads would turn the logits into a tuple, in training only.
        return {"aux_logits": False, "init_weights": True}
    if short.startswith("vit_"):
        return {"image_size": image_size}
    if short == "maxvit_t":
        return {"input_size": (image_size, image_size)}
    return {}


def _replace_first_convolution(model: str, body: nn.Module, in_channels: int) -> None:
    name, old = next(
        (name, module) for name, module in body.named_modules() if isinstance(module, nn.Conv2d)
    )
    if old.in_channels != 3 or old.groups != 1:
        raise ValueError(f"model {model!r} takes 3-channel images, these have {in_channels}")
    new = nn.Conv2d(
        in_channels,
        old.out_channels,
        old.kernel_size,  # type: ignore[arg-type]
        old.stride,  # type: ignore[arg-type]
        old.padding,  # type: ignore[arg-type]
        old.dilation,  # type: ignore[arg-type]
        bias=old.bias is not None,
    )
    # torch's default init is not the model's own; keep the scale that torchvision chose.
    nn.init.normal_(new.weight, std=float(old.weight.detach().std()))
    if new.bias is not None:
        nn.init.zeros_(new.bias)
    parent, _, attribute = name.rpartition(".")
    setattr(body.get_submodule(parent), attribute, new)
