"""Classifiers in a local folder, as `save_pretrained` writes it: `hf/<folder>`.

The one door to transformers; a folder of timm's is built by timm. Nothing is downloaded, and no
code that a folder brings is run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fedkd.io.extras import extra
from fedkd.io.tensors import load_state
from fedkd.io.text import nearest
from fedkd.models.foundation import TIMM, named_errors, timm_model
from fedkd.models.preparation import Preparation
from fedkd.models.weights import WeightsFile, read_weights

HF = "hf/"

_CONFIG, _PREPARATION = "config.json", "preprocessor_config.json"
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


class HubClassifier(nn.Module):
    """An image classifier of transformers that gives its logits alone."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, C) of normalised images."""
        logits: Tensor = self.network(pixel_values=images).logits
        return logits


def check_folder(name: str) -> None:
    """Raise `ValueError` unless a folder is named, or `MissingExtra`."""
    if not name.removeprefix(HF):
        raise ValueError(f"model {name!r}: expected hf/ and a local folder, e.g. hf/vit-small")
    _transformers()


def hub_files(folder: Path) -> dict[str, Path]:
    """What a network is read from, by name; the last is that of the weights.

    Raises:
        ValueError: one is missing; one line.
    """
    weights = next((name for name in _WEIGHTS if (folder / name).is_file()), None)
    if not (folder / _CONFIG).is_file() or weights is None:
        wanted = _CONFIG if not (folder / _CONFIG).is_file() else _WEIGHTS[0]
        raise ValueError(
            f"{folder} has no {wanted}; expected a folder as save_pretrained writes it (nothing is "
            "downloaded)"
        )
    names = (_CONFIG, _PREPARATION, weights)
    return {name: folder / name for name in names if (folder / name).is_file()}


def hub_channels(folder: Path) -> int:
    """Channels of the images that a network takes."""
    facts = _facts(folder)
    size = _timm_facts(facts).get("input_size") if "architecture" in facts else None
    return int(size[0]) if size else int(facts.get("num_channels", 3))


def hub_model(
    name: str,
    folder: Path,
    num_classes: int,
    in_channels: int,
    image_size: int,
    options: Mapping[str, Any],
    *,
    own: bool,
) -> tuple[nn.Module, Preparation | None]:
    """The untrained network of a folder, and how its images are prepared.

    Args:
        name: `hf/<folder>`, for messages.
        folder: Where it is.
        num_classes: Width of the logits.
        in_channels: Channels of the images.
        image_size: Side of the images.
        options: In place of values of its config, e.g. `{"hidden_dropout_prob": 0.1}`.
        own: Build it for images of its own size instead of these.

    Returns:
        The preparation is None if the folder does not say it.

    Raises:
        ValueError: the folder holds no image classifier, or one that takes no such options.
    """
    hub_files(folder)
    facts = _facts(folder)
    if "architecture" in facts:
        given = {**facts.get("model_args", {}), **options}
        body, usual = timm_model(
            TIMM + str(facts["architecture"]), num_classes, in_channels, image_size, given, own=own
        )
        said = _timm_facts(facts)
        mean, std = said.get("mean", usual.mean), said.get("std", usual.std)
        side = int(said.get("input_size", [usual.side])[-1])
        return body, Preparation(side, tuple(mean), tuple(std))
    with named_errors(name):
        library = _transformers()
        config = library.AutoConfig.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
        for key, value in options.items():
            if not hasattr(config, key):
                known = list(config.to_dict())
                raise ValueError(f"its config has no {key!r}{nearest(key, known)}")
            setattr(config, key, value)
        config.num_labels = num_classes
        side = _side(folder, config)
        if not own and hasattr(config, "image_size") and "image_size" not in options:
            config.image_size = image_size
        body = HubClassifier(library.AutoModelForImageClassification.from_config(config))
    said = _json(folder / _PREPARATION) if (folder / _PREPARATION).is_file() else {}
    if "image_mean" not in said or "image_std" not in said:
        return body, None
    if said.get("do_normalize") is False:
        said = {"image_mean": [0.0] * in_channels, "image_std": [1.0] * in_channels}
    mean, std = (tuple(map(float, said[key])) for key in ("image_mean", "image_std"))
    return body, Preparation(side, mean, std)


def hub_weights(name: str, folder: Path) -> WeightsFile:
    """What the folder of a network holds, under the names of `hub_model`.

    Raises:
        ValueError: it cannot be read; one line.
    """
    files = hub_files(folder)
    path = list(files.values())[-1]
    facts = _facts(folder)
    if "architecture" in facts:
        found = read_weights(path)
        return WeightsFile(path, found.tensors, None, str(facts["architecture"]))
    with named_errors(name):
        load_state(path)  # what is damaged is named here, in one line
        # Not read by us: the library knows names of earlier versions.
        with _quiet():
            network = _transformers().AutoModelForImageClassification.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
    labels = [str(label) for _, label in sorted(network.config.id2label.items())]
    named = not all(label.startswith("LABEL_") for label in labels)
    tensors = {f"network.{key}": tensor for key, tensor in network.state_dict().items()}
    return WeightsFile(path, tensors, tuple(labels) if named else None, facts.get("model_type"))


def _side(folder: Path, config: Any) -> int:
    said = _json(folder / _PREPARATION) if (folder / _PREPARATION).is_file() else {}
    for given in (getattr(config, "image_size", None), said.get("crop_size"), said.get("size")):
        if isinstance(given, Mapping):
            given = given.get("height") or given.get("shortest_edge")
        if isinstance(given, list | tuple):
            given = given[0]
        if given:
            return int(given)
    return 224


def _timm_facts(facts: Mapping[str, Any]) -> Mapping[str, Any]:
    found = facts.get("pretrained_cfg")
    return found if isinstance(found, Mapping) else {}


def _facts(folder: Path) -> dict[str, Any]:
    hub_files(folder)
    return _json(folder / _CONFIG)


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a mapping, got {type(content).__name__}")
    return content


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's progress bar, which is through in no time."""
    bars = _transformers().utils.logging
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()


def _transformers() -> Any:
    with extra("foundation", "a model `hf/...`"):
        import fedkd.data.vision  # noqa: F401  first, since it imports torchvision # isort: skip
        import transformers
    return transformers
