"""Models that any importable function makes: `target: package.function` in a model entry.

A function is code that a config has chosen, as a plugin is, and is under the same rule: it is
called only after the config's own plugins were imported, among which it stands as
`package:function` (`fedkd.config.import_plugins`).
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from fedkd.io.text import nearest
from fedkd.models.checks import one_line
from fedkd.models.network import shown
from fedkd.models.preparation import Preparation
from fedkd.registry import NotAFunction, target_name

# What a function may be told of the images, and what the argument is called by convention.
_FACTS = {"classes": "num_classes", "channels": None, "size": None}

# Libraries that import torchvision, which has a door of its own here.
_BESIDE_TORCHVISION = ("torchvision", "timm", "open_clip", "transformers")


_ADMITTED: dict[str, Callable[..., Any]] = {}


def admitted(name: str) -> bool:
    """Whether a function may be called."""
    return name in _ADMITTED


def admit(name: str) -> None:
    """Import a function, which may be called from now on.

    Raises:
        NotAFunction: its module has none of that name.
        Exception: whatever importing its module raises.
    """
    module, _, function = target_name(name).partition(":")
    if module.split(".")[0] in _BESIDE_TORCHVISION:
        importlib.import_module("fedkd.data.vision")
    found = importlib.import_module(module)
    if not hasattr(found, function):
        known = [each for each in dir(found) if callable(getattr(found, each, None))]
        raise NotAFunction(f"module {module!r} has no {function!r}{nearest(function, known)}")
    made = getattr(found, function)
    if not callable(made):
        raise NotAFunction(f"{function!r} of module {module!r} is {shown(made)}, not a function")
    _ADMITTED[name] = made


def check_target(name: str, options: Mapping[str, Any]) -> None:
    """Check a function and its arguments, before there are images.

    Raises:
        ValueError: it has not been admitted, or does not take the options.
    """
    if not admitted(name):
        raise ValueError(
            f"model {name!r} is code: a config names it among its plugins (plugins: [{name!r}]); "
            "in Python, call it yourself and hand over the module"
        )
    _arguments(name, options, 2, 3, 32)


def target_model(
    name: str, num_classes: int, in_channels: int, image_size: int, options: Mapping[str, Any]
) -> tuple[nn.Module, Preparation | None]:
    """What a function makes, and how its images are prepared where it says so as timm's do.

    Args:
        name: `package.module:function`.
        num_classes: Width of the logits.
        in_channels: Channels of the images.
        image_size: Side of the images.
        options: Its arguments, and `arguments`: what those are called that take the number of
            `classes` (by convention `num_classes`, if it has one), of `channels` and the `size`.

    Raises:
        ValueError: it fails, or makes no module.
    """
    check_target(name, options)
    given = _arguments(name, options, num_classes, in_channels, image_size)
    try:
        body = _ADMITTED[name](**given)
    except Exception as error:  # it is the user's code: anything may come up
        shown_ = ", ".join(f"{key}={value!r}" for key, value in given.items())
        reason = f"{type(error).__name__}: {one_line(error)[:200]}"
        raise ValueError(f"model {name!r} fails with ({shown_}): {reason}") from error
    if not isinstance(body, nn.Module):
        raise ValueError(f"model {name!r}: expected a torch.nn.Module, it made {shown(body)}")
    return body, published_for(body)


def published_for(body: nn.Module) -> Preparation | None:
    """How timm's networks say that images are prepared for the weights that they are known with."""
    facts = getattr(body, "pretrained_cfg", None)
    if not isinstance(facts, Mapping) or not {"mean", "std", "input_size"} <= set(facts):
        return None
    mean, std = (tuple(map(float, facts[key])) for key in ("mean", "std"))
    return Preparation(int(facts["input_size"][-1]), mean, std)


def _arguments(
    name: str, options: Mapping[str, Any], num_classes: int, in_channels: int, image_size: int
) -> dict[str, Any]:
    given = dict(options)
    chosen = given.pop("arguments", {})
    if not isinstance(chosen, Mapping) or not all(isinstance(v, str) for v in chosen.values()):
        raise ValueError(
            f"model {name!r}: arguments: expected names such as {{classes: num_classes}}, got "
            f"{chosen!r}"
        )
    for key in chosen:
        if key not in _FACTS:
            raise ValueError(
                f"model {name!r}: arguments: has no key {key!r}{nearest(str(key), list(_FACTS))} "
                f"(keys: {', '.join(_FACTS)})"
            )
    facts = {"classes": num_classes, "channels": in_channels, "size": image_size}
    try:
        signature = inspect.signature(_ADMITTED[name])
    except (TypeError, ValueError):  # of a built-in function
        signature = None
    for key, usual in _FACTS.items():
        argument = chosen.get(key, usual if _takes(signature, usual) else None)
        if argument is None:
            continue
        if argument in given:
            raise ValueError(
                f"model {name!r}: {argument}: the images decide it ({key}); take it out, or name "
                f"another argument in arguments.{key}"
            )
        given[argument] = facts[key]
    if signature is not None:
        try:
            signature.bind(**given)
        except TypeError as error:
            known = ", ".join(signature.parameters) or "none"
            raise ValueError(f"model {name!r}: {error} (arguments: {known})") from None
    return given


def _takes(signature: inspect.Signature | None, argument: str | None) -> bool:
    if signature is None or argument is None:
        return False
    parameters = signature.parameters.values()
    return argument in signature.parameters or any(p.kind is p.VAR_KEYWORD for p in parameters)
