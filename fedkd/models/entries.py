"""A model entry of a config: what it is called, its options, and where its weights come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedkd.models.foundation import OPEN_CLIP, TIMM, check_name, reads_texts, zero_shot
from fedkd.models.hub import HF, hub_files, hub_weights
from fedkd.models.linear import body_of
from fedkd.models.network import Network
from fedkd.models.torchvision_models import PREFIX
from fedkd.models.weights import load_weights, read_weights

FOREIGN = (PREFIX, TIMM, OPEN_CLIP, HF)
"""Prefixes of models that other libraries build."""


@dataclass(frozen=True)
class Published:
    """Keys of a model entry that say where its weights come from; the others are its options.

    Attributes:
        weights: A file. Images are then prepared as the model was published for.
        resize: `bicubic`: images are brought to the model's own size, also without weights;
            `none`: it is built for the images; None: `bicubic` if a file or prompts are given.
        prompts: Texts of the classes, a zero-shot classifier: templates with `{}` for the name of
            the class, or class -> text or texts.
        mean: Per-channel mean of the pixels in [0, 1] that the model is used to; None: that which
            it was published with if a file or prompts are given, else that of the images.
        std: Likewise, the standard deviation.
    """

    weights: str | None = None
    resize: str | None = None
    prompts: Any = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    @classmethod
    def of(cls, name: str, options: Mapping[str, Any]) -> tuple[Published, dict[str, Any]]:
        """These keys, and the options that are left.

        Raises:
            ValueError: a value that none can be, or a key that this model cannot have.
        """
        rest = dict(options)
        statistics = (_numbers(key, rest.pop(key, None)) for key in ("mean", "std"))
        found = cls(*(rest.pop(key, None) for key in ("weights", "resize", "prompts")), *statistics)
        if (found.mean is None) != (found.std is None):
            raise ValueError("mean and std: expected both or none")
        if found.weights is not None and not (isinstance(found.weights, str) and found.weights):
            raise ValueError(f"weights: expected the path of a file, got {found.weights!r}")
        if name.startswith(HF):
            if found.weights is not None:
                raise ValueError("weights: the folder has its own; take weights out")
            found = replace(found, weights=name.removeprefix(HF))
        if found.resize not in (None, "bicubic", "none"):
            raise ValueError(f"resize: expected bicubic or none, got {found.resize!r}")
        if found.resize is not None and not name.startswith(FOREIGN):
            raise ValueError(
                f"resize: model {name!r} has no size of its own, it is built for the images; take "
                "resize out"
            )
        if found.prompts is not None:
            _check_prompts(name, found.prompts, rest)
        return found, rest

    @property
    def as_published(self) -> bool:
        """Whether the images' statistics are the model's own."""
        return self.weights is not None or self.prompts is not None or self.resize == "bicubic"

    @property
    def own_size(self) -> bool:
        """Whether images are brought to the model's own size."""
        return self.as_published and self.resize != "none"

    def statistics(
        self, mean: Sequence[float], std: Sequence[float]
    ) -> tuple[Sequence[float], Sequence[float]]:
        """These, or what stands in their place. Raises `ValueError` for other channels."""
        if self.mean is None or self.std is None:
            return mean, std
        for key, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != len(mean):
                raise ValueError(f"{key}: expected {len(mean)} values, got {len(values)}")
        return self.mean, self.std

    def texts(self, classes: Sequence[str]) -> list[list[str]]:
        """The texts of each class. Raises `ValueError` if one has none."""
        given = self.prompts
        if isinstance(given, Mapping):
            texts = {str(name): some for name, some in given.items()}
            if missing := [name for name in classes if name not in texts]:
                raise ValueError(f"prompts: no text for class {missing[0]!r}")
            return [_listed(texts[name]) for name in classes]
        return [[template.replace("{}", name) for template in _listed(given)] for name in classes]


def _numbers(key: str, given: Any) -> tuple[float, ...] | None:
    if given is None:
        return None
    values = given if isinstance(given, Sequence) and not isinstance(given, str) else None
    if not values or not all(
        isinstance(v, int | float) and not isinstance(v, bool) for v in values
    ):
        raise ValueError(f"{key}: expected a number for each channel, got {given!r}")
    return tuple(map(float, values))


def _listed(given: str | Sequence[str]) -> list[str]:
    return [given] if isinstance(given, str) else [str(text) for text in given]


def _check_prompts(name: str, prompts: Any, options: Mapping[str, Any]) -> None:
    if not name.startswith(OPEN_CLIP):
        raise ValueError(
            f"prompts: model {name!r} reads no texts; take one of open_clip/, or no prompts"
        )
    if not isinstance(prompts, str | Sequence | Mapping) or not prompts:
        raise ValueError(f"prompts: expected texts, or class -> texts, got {prompts!r}")
    if not isinstance(prompts, Mapping):
        for template in _listed(prompts):
            if "{}" not in template or template.count("{") + template.count("}") != 2:
                raise ValueError(
                    f"prompts: expected one {{}} for the name of the class, got {template!r}"
                )
    check_name(name)
    if (reason := reads_texts(name, options)) is not None:
        raise ValueError(f"prompts: model {name!r}: {reason}; take one with CLIP's own tokenizer")


def place_of(name: str, options: Mapping[str, Any], root: Path | None) -> Path | None:
    """The file of weights that an entry names, or its folder; relative paths start from `root`."""
    name, options = body_of(name, options) or (name, options)
    given = name.removeprefix(HF) if name.startswith(HF) else options.get("weights")
    return None if given is None else (root or Path()) / Path(str(given)).expanduser()


def files_of(name: str, options: Mapping[str, Any], root: Path | None) -> dict[str, Path]:
    """All files that an entry's network is read from, as the config names them.

    Raises:
        ValueError: one is missing in a folder; one line.
    """
    name, options = body_of(name, options) or (name, options)
    place = place_of(name, options, root)
    if place is None:
        return {}
    if name.startswith(HF):
        return {f"{name.removeprefix(HF)}/{key}": path for key, path in hub_files(place).items()}
    return {str(options["weights"]): place}


def frozen_of(name: str, options: Mapping[str, Any], root: Path) -> Path | None:
    """What a saved network of an entry is not whole without: where a part is frozen."""
    return place_of(name, options, root) if "peft" in options else None


def load_entry(
    network: Network,
    name: str,
    options: Mapping[str, Any],
    path: Path,
    classes: Sequence[str],
    *,
    whole: bool = False,
) -> str | None:
    """Put a file's weights into the network of a model entry, in place.

    Args:
        network: Of `build_model` with these options.
        name: Of the model.
        options: Of the entry, but for what of it learns.
        path: The file or folder that it is to begin with; `place_of`.
        classes: Names of the classes.
        whole: Whether the head must be in the file too.

    Returns:
        A remark for the user if names had to be guessed, or if the head is new.

    Raises:
        ValueError: the file is not there or does not fit; one line.
    """
    file = hub_weights(name, path) if name.startswith(HF) else read_weights(path)
    published, rest = Published.of(name, options)
    count = network.head.out_features if network.head is not None else len(classes)
    what = f"{name} for {count} classes"
    if published.prompts is not None:
        texts = published.texts(classes)
        try:
            made = zero_shot(name, rest, file.tensors, texts)
        except ValueError as error:
            raise ValueError(f"{path} does not fit {what}: {error}") from None
        file = replace(file, tensors=made, classes=None)
    elif name.startswith(OPEN_CLIP):  # the text encoder is of no use without texts
        image = ("visual.", "head.", "body.", "mean", "std")
        kept = {key: t for key, t in file.tensors.items() if key.startswith(image)}
        file = replace(file, tensors=kept or file.tensors)
    elif name in _AUXILIARY:
        kept = {key: t for key, t in file.tensors.items() if not key.lower().startswith("aux")}
        file = replace(file, tensors=kept)
    return load_weights(network, file, what, whole=whole, classes=classes)


# Published with heads that only count in training, which are not built here.
_AUXILIARY = ("torchvision/googlenet", "torchvision/inception_v3")
