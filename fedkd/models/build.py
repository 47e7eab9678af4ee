"""From a model's name (or a user's own module) to a tapped, checked `Network`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedkd.io.text import nearest
from fedkd.models import MODELS
from fedkd.models.checks import normaliser, one_line
from fedkd.models.entries import FOREIGN, Published, load_entry, place_of
from fedkd.models.foundation import OPEN_CLIP, TIMM, check_name, open_clip_model, timm_model
from fedkd.models.head import find_classifier
from fedkd.models.hub import HF, check_folder, hub_channels, hub_model
from fedkd.models.linear import LINEAR, Frozen, PrincipalClassifier, body_of
from fedkd.models.network import Network, declared, declared_stages, shown
from fedkd.models.peft import Peft, adapt
from fedkd.models.preparation import Preparation
from fedkd.models.taps import evaluating, find_stages
from fedkd.models.targets import check_target, published_for, target_model
from fedkd.models.torchvision_models import PREFIX, torchvision_model, torchvision_names
from fedkd.randomness import seeded
from fedkd.registry import is_target


def model_names() -> list[str]:
    """All names `build_model` knows: ours, sorted, then `torchvision/...`."""
    return MODELS.names() + torchvision_names()


def check_entry(name: str, options: Mapping[str, Any]) -> None:
    """Check the name and options of a model, before there are images or a file.

    Raises:
        ValueError: unknown name or option, or an option of the wrong type.
        MissingExtra: the library of the model is not installed.
    """
    options = dict(options)
    peft_of(name, options)
    published, rest = Published.of(name, options)
    if published.prompts is not None and published.weights is None:
        raise ValueError(
            "prompts: texts and images are read by the encoders of one file: set weights"
        )
    if name.startswith(PREFIX):
        if name not in torchvision_names():
            raise ValueError(f"unknown model {name!r}{nearest(name, model_names())}")
    elif name.startswith((TIMM, OPEN_CLIP)):
        check_name(name)
    elif name.startswith(HF):
        check_folder(name)
    elif is_target(name):
        check_target(name, rest)
    else:
        MODELS.check(name, rest)
        if (body := body_of(name, rest)) is not None:
            _check_body(*body, published)


def _check_body(name: str, options: Mapping[str, Any], published: Published) -> None:
    """Check the network that `linear` takes its features from. Raises `ValueError`."""
    if published != Published():
        raise ValueError(
            "features: the network has its own weights, mean and std: name them in features"
        )
    if is_target(name) or name == LINEAR or "peft" in options or "prompts" in options:
        raise ValueError(
            "features: expected pixels, patches, or a network of ours or of a library, without "
            f"peft and prompts, got {name!r}"
        )
    try:
        check_entry(name, options)
    except ValueError as error:
        raise ValueError(f"features: {error}") from None
    if "weights" not in options and not name.startswith(HF):
        raise ValueError(
            f"features: {name!r} would stay at its random weights; give it weights, a file"
        )


def is_known(name: str) -> bool:
    """Whether some library here has such a model, plugins apart."""
    return name.startswith((TIMM, OPEN_CLIP, HF)) or name in model_names()


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
    file: Path | None = None,
    root: Path | None = None,
    classes: Sequence[str] = (),
    whole: bool = False,
    notify: Callable[[str], None] = lambda _text: None,
    public: Tensor | None = None,
) -> Network:
    """A network with its preprocessing and taps, tried on two black images.

    Args:
        model: A registered name (`resnet20`), a torchvision one (`torchvision/resnet18`), an
            admitted function (`package:function`), or a ready module that maps normalised images
            to logits. A module that declares no `stages` gets them from `find_stages`; the head
            is found by `find_classifier`.
        num_classes: Width of the logits.
        in_channels: Channels of the images.
        image_size: Side of the images.
        mean: Per-channel mean of the pixels in [0, 1].
        std: Per-channel standard deviation of the pixels in [0, 1].
        seed: Run seed; the weights come from its stream `init/<name>` and the global
            generators stay untouched. A ready module keeps its weights. What `peft` freezes is
            the same for every seed.
        options: Keyword options of the named model; `weights`, `resize`, `prompts`, `mean` and
            `std` as in `Published`; and `peft`: what of it learns (a `fedkd.models.peft.Peft`, or
            its options).
        file: What it begins with; None: drawn. (The path among the options only says that images
            are prepared as for a published model.)
        root: Folder that a path in the model's name starts from; None: this one.
        classes: Names of the classes, where a file is to be compared with them or texts are made.
        whole: Whether the head must be in the file too.
        notify: Called with what the user should know of the file.
        public: Public images, uint8 (N, in_channels, image_size, image_size), for models that are
            made from such (`linear`). Empty: the state that is loaded next has what they showed.

    Raises:
        ValueError: unknown name or option, a model that cannot take such images, logits of
            another shape than (2, num_classes), a declared head that is none, a module that
            normalises the images itself, or a file that is not there or does not fit.
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
    published, rest = Published.of(name, options)
    channels, side, resize = in_channels, image_size, None
    if isinstance(model, str) and (inner := body_of(name, rest)) is not None:
        try:
            network = build_model(
                inner[0],
                num_classes=num_classes,
                in_channels=in_channels,
                image_size=image_size,
                mean=mean,
                std=std,
                seed=seed,
                options=inner[1],
                file=file,
                root=root,
            )
            rest["features"] = Frozen(network)
        except ValueError as error:
            raise ValueError(f"model {name!r}: features: {error}") from None
        file = None
    folder = place_of(name, {}, root) if name.startswith(HF) else None
    with seeded(seed if peft is None else 0, "init", name):
        if in_channels == 1 and (
            hub_channels(folder) == 3
            if folder is not None
            else name.startswith(OPEN_CLIP) or (published.as_published and name.startswith(FOREIGN))
        ):
            channels, mean, std = 3, [*mean] * 3, [*std] * 3
        body, preparation = _body(model, num_classes, channels, image_size, rest, published, folder)
        if preparation is not None and published.as_published:
            if len(preparation.mean) != channels:
                raise ValueError(
                    f"model {name!r} takes {len(preparation.mean)}-channel images, these have "
                    f"{in_channels}"
                )
            mean, std = preparation.mean, preparation.std
            if published.own_size and not is_target(name):
                side = preparation.side
                resize = side if side != image_size else None
        if isinstance(model, nn.Module) and published.mean is None:
            _say_statistics(model, name, mean, std, notify)
        mean, std = published.statistics(mean, std)
        if isinstance(body, PrincipalClassifier):
            if body.reader is not None:  # which takes pixels from 0 to 1
                mean, std = [0.0] * channels, [1.0] * channels
            _show(body, name, public, mean, std)
        parameter = next(body.parameters(), torch.empty(0))
        images = torch.zeros(2, channels, side, side, device=parameter.device)
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
        hint = ""
        if is_target(name):
            hint = "; say in `arguments` what it calls the number of classes, channels or the size"
        raise ValueError(
            f"model {name!r}: expected logits {(2, num_classes)} for two {size} images, got "
            f"{shape}{hint}"
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
        resize=resize,
        grey=channels > in_channels,
    )
    network.to(parameter.device)
    if file is not None:
        remark = load_entry(network, name, options, file, classes, whole=whole)
        if remark is not None:
            notify(remark)
    if peft is not None:
        try:
            adapt(network, peft, seed=seed)
        except ValueError as error:
            raise ValueError(f"model {name!r}: peft: {error}") from None
    return network


def _say_statistics(
    model: nn.Module,
    name: str,
    mean: Sequence[float],
    std: Sequence[float],
    notify: Callable[[str], None],
) -> None:
    """Say how images are normalised for a ready module that was published for something else.

    Whether its weights are the published ones cannot be seen.
    """
    said = published_for(model)
    if said is None or (said.mean, said.std) == (tuple(mean), tuple(std)):
        return
    notify(
        f"model: {name} is normalised by the images at hand (mean {_few(mean)}, std {_few(std)}); "
        f"its pretrained_cfg has mean {_few(said.mean)}, std {_few(said.std)}: where its weights "
        "are the published ones, give these as mean= and std="
    )


def _few(values: Sequence[float]) -> str:
    return f"[{', '.join(f'{value:.3g}' for value in values)}]"


def _show(
    body: PrincipalClassifier,
    name: str,
    public: Tensor | None,
    mean: Sequence[float],
    std: Sequence[float],
) -> None:
    """Let a model see the public images that it is made from. Raises `ValueError`."""
    if public is None:
        raise ValueError(
            f"model {name!r} is made from public images, and there are none here: give build_model "
            "public="
        )
    if len(public):
        try:
            body.see(public, torch.tensor(mean), torch.tensor(std))
        except ValueError as error:
            raise ValueError(f"model {name!r}: {error}") from None


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
    published: Published,
    folder: Path | None,
) -> tuple[nn.Module, Preparation | None]:
    if isinstance(model, Network):
        raise ValueError("model: expected a module that takes normalised images, got a Network")
    if isinstance(model, nn.Module):
        if options or published != Published(mean=published.mean, std=published.std):
            raise ValueError(
                f"model: a ready module takes no options but mean and std, got {dict(options)}"
            )
        twice = normaliser(model)
        if twice is not None and published.mean is None:
            zeros, ones = [0.0] * in_channels, [1.0] * in_channels
            raise ValueError(
                f"model: {type(model).__name__} normalises images itself ({twice}), they would be "
                "normalised twice; take that out, or keep it with "
                f"fedkd.network(model, ..., mean={zeros}, std={ones})"
            )
        return model, None
    sizes, own = (num_classes, in_channels, image_size), published.own_size
    if model.startswith(PREFIX):
        return torchvision_model(model, *sizes, options, own=own)
    if model.startswith(TIMM):
        return timm_model(model, *sizes, options, own=own)
    if folder is not None:
        body, preparation = hub_model(model, folder, *sizes, options, own=own)
        if preparation is None and published.mean is None:
            raise ValueError(
                f"model {model!r}: its folder does not say how images are normalised (no "
                "preprocessor_config.json with image_mean and image_std); set mean and std"
            )
        return body, preparation
    if is_target(model):
        return target_model(model, *sizes, options)
    if model.startswith(OPEN_CLIP):
        unit = published.prompts is not None
        return open_clip_model(model, num_classes, image_size, options, own=own, unit=unit)
    try:
        return MODELS.create(model, *sizes, **options), None
    except (RuntimeError, MemoryError, ArithmeticError, IndexError) as error:
        if not options:
            raise
        given = ", ".join(f"{key}={value!r}" for key, value in options.items())
        raise ValueError(
            f"model {model!r} cannot be built with {given}: {one_line(error)[:200]}"
        ) from None
