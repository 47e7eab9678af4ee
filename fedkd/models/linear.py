"""A linear classifier on features that stay as they are: what DP-SGD can train on small shards."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedkd.data.features import Basis, basis_of, shown_by, unit_features
from fedkd.models import MODELS
from fedkd.models.network import Network

LINEAR = "linear"

# Public images of which features are read; more show the directions no better.
_ENOUGH = 2000
# Features of one kind say much in directions in which they hardly differ; pixels only noise.
_RIDGE = 1e-3
# Patches that a dictionary is learnt from, and passes over them.
_PATCHES, _PASSES = 30_000, 10
# Added to the variance of a patch, as for pixels from 0 to 1: a grey wall has no edges.
_FLAT = (10 / 255) ** 2
# Images at once: each of them has hundreds of patches.
_BATCH = 100


class Patches(nn.Module):
    """How near an image's patches come to the typical ones, averaged over its quarters.

    The typical patches are the centres of k-means on normalised, whitened patches of public
    images; how near is `max(0, mean distance to all centres - distance to this one)`.

    Args:
        channels: Of the images.
        image_size: Their side.
        centres: How many typical patches; an image has four times as many features.

    References:
        Coates, Lee and Ng, "An Analysis of Single-Layer Networks in Unsupervised Feature
            Learning", AISTATS 2011
    """

    shift: Tensor
    whitening: Tensor
    centres: Tensor

    def __init__(self, channels: int, image_size: int, centres: int) -> None:
        super().__init__()
        if centres < 2:
            raise ValueError(f"features: centres: expected at least 2, got {centres}")
        if image_size < 4:
            raise ValueError(f"features: images of side {image_size} have no patches")
        self.side = max(3, image_size // 5)
        self.stride = (self.side + 1) // 3
        self.width = 4 * centres
        numbers = channels * self.side**2
        self.register_buffer("shift", torch.zeros(numbers))
        self.register_buffer("whitening", torch.zeros(numbers, numbers))
        self.register_buffer("centres", torch.zeros(centres, numbers))

    @property
    def name(self) -> tuple[object, ...]:
        """What public images show to it."""
        return ("patches", self.side, self.stride, len(self.centres))

    def see(self, images: Tensor) -> None:
        """Learn what is typical of public images, uint8 (N, channels, height, width)."""
        learnt = shown_by(images, ("dictionary", *self.name), lambda: self._learn(images))
        for buffer, value in zip((self.shift, self.whitening, self.centres), learnt, strict=True):
            buffer.copy_(value)

    def _learn(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        images = images[:_ENOUGH].cpu()
        generator = torch.Generator().manual_seed(0)  # the same for everybody

        def among(count: int) -> Tensor:
            return torch.randint(count, (_PATCHES, 1, 1), generator=generator)

        within = torch.arange(self.side)
        rows = among(images.shape[2] - self.side + 1) + within[:, None]
        columns = among(images.shape[3] - self.side + 1) + within
        # Advanced indexing on both sides of the channels puts these last.
        drawn = images[among(len(images)), :, rows, columns].permute(0, 3, 1, 2)
        patches = _contrast(drawn.flatten(1).float() / 255)
        shift = patches.mean(dim=0)
        centred = (patches - shift).double()
        variances, axes = torch.linalg.eigh(centred.T @ centred / len(centred))
        whitening = (axes * (variances.clamp(min=0) + 0.1).rsqrt()) @ axes.T
        white = (centred @ whitening).float()
        centres = white[: len(self.centres)].clone()
        for _ in range(_PASSES):
            nearest = torch.cdist(white, centres).argmin(dim=1)
            counts = nearest.bincount(minlength=len(centres))[:, None]
            total = torch.zeros_like(centres).index_add_(0, nearest, white)
            centres = torch.where(counts > 0, total / counts.clamp(min=1), centres)
        return shift, whitening.float(), centres

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, channels, h, w) from 0 to 1 -> (B, 4 * centres)."""
        parts = pixels.split(_BATCH) if len(pixels) else [pixels]
        return torch.cat([self._near(part) for part in parts])

    def _near(self, pixels: Tensor) -> Tensor:
        places = [(side - self.side) // self.stride + 1 for side in pixels.shape[2:]]
        patches = functional.unfold(pixels, self.side, stride=self.stride).transpose(1, 2)
        white = (_contrast(patches) - self.shift) @ self.whitening
        squares = white.square().sum(dim=2, keepdim=True) + self.centres.square().sum(dim=1)
        distances = (squares - 2 * white @ self.centres.T).clamp(min=1e-12).sqrt()
        near = (distances.mean(dim=2, keepdim=True) - distances).clamp(min=0)
        return functional.adaptive_avg_pool2d(near.transpose(1, 2).unflatten(2, places), 2).flatten(
            1
        )


def _contrast(patches: Tensor) -> Tensor:
    """Patches (..., D) of mean zero and about the same deviation."""
    centred = patches - patches.mean(dim=-1, keepdim=True)
    return centred / (centred.square().mean(dim=-1, keepdim=True) + _FLAT).sqrt()


class Frozen(nn.Module):
    """What enters the head of a network that somebody has trained on other images.

    Never trained, always in evaluation mode: no statistic of the images that it reads is kept.

    Args:
        network: Taken over, without its head.

    Raises:
        ValueError: it has no head.
    """

    def __init__(self, network: Network) -> None:
        super().__init__()
        head = network.head
        if head is None or network.head_name is None:
            raise ValueError("it has no linear head whose input could be read")
        self.width = head.in_features
        network.body.set_submodule(network.head_name, nn.Identity())
        network.head_name = None
        self.network = network.requires_grad_(False)
        self.train(False)

    @property
    def name(self) -> tuple[object, ...]:
        """What public images show to it."""
        digest = hashlib.sha256()
        for key, tensor in sorted(self.network.state_dict().items()):
            digest.update(key.encode() + tensor.cpu().contiguous().numpy().tobytes())
        return ("frozen", digest.hexdigest())

    def see(self, images: Tensor) -> None:
        """Nothing: it is what it is."""

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode."""
        return super().train(False)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, channels, h, w) from 0 to 1 -> (B, width)."""
        features: Tensor = self.network(pixels)
        return features.flatten(1)


class PrincipalClassifier(nn.Module):
    """A linear layer on principal directions of public images, which stay as they are.

    Args:
        inputs: How many numbers an image has for it.
        directions: Of those numbers.
        num_classes: Width of the logits.
        reader: Makes the numbers of pixels from 0 to 1; None: they are the pixels, normalised.
    """

    stages: tuple[str, ...] = ()
    head_name = "head"
    centre: Tensor
    axes: Tensor

    def __init__(
        self,
        inputs: int,
        directions: int,
        num_classes: int,
        reader: Patches | Frozen | None = None,
    ) -> None:
        super().__init__()
        self.reader = reader
        self.register_buffer("centre", torch.zeros(inputs))
        self.register_buffer("axes", torch.zeros(inputs, directions))
        # From zero, so that the first noisy gradient is all that there is.
        self.head = nn.Linear(directions, num_classes, bias=False)
        nn.init.zeros_(self.head.weight)

    def see(self, images: Tensor, mean: Tensor, std: Tensor) -> None:
        """Take the directions from public images, uint8 (N, channels, height, width).

        Args:
            images: The images.
            mean: With which networks normalise them, (channels,).
            std: Likewise.

        Raises:
            ValueError: these images have not so many directions.
        """
        directions = self.axes.shape[1]
        if (reader := self.reader) is not None:
            reader.see(images)
            what = (*reader.name, directions)
            basis = shown_by(images, what, lambda: self._basis(reader, images, directions))
            self.centre.copy_(basis.centre)
            self.axes.copy_(basis.axes)
            return
        basis = basis_of(images, directions)
        shift, scale = (
            value.view(-1, 1, 1).expand(images.shape[1:]).flatten().float() for value in (mean, std)
        )
        self.centre.copy_((basis.centre - shift) / scale)
        self.axes.copy_(basis.axes * scale[:, None])

    @staticmethod
    def _basis(reader: nn.Module, images: Tensor, directions: int) -> Basis:
        with torch.no_grad():
            parts = images[:_ENOUGH].split(_BATCH)
            numbers = torch.cat([reader(part.float() / 255) for part in parts])
        return Basis.of(numbers, directions, _RIDGE)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, C) of normalised images (B, channels, h, w)."""
        numbers = images.flatten(1) if self.reader is None else self.reader(images)
        logits: Tensor = self.head(unit_features(numbers, self.centre, self.axes))
        return logits


@MODELS.register(LINEAR)
def linear(
    num_classes: int,
    in_channels: int,
    image_size: int,
    *,
    directions: int = 24,
    features: str | dict[str, Any] | Frozen = "pixels",
) -> nn.Module:
    """Linear classifier on principal directions of the public images; for DP-SGD on small shards.

    Args:
        directions: How many: fewer bear more noise, more tell more apart.
        features: Of what: `pixels`; `patches` (or `{name: patches, centres: 200}`), how near an
            image's patches come to those that are typical of public images; or a network with
            weights from a file, `{name: resnet8, weights: body.pt}`, whose head is left away.
    """
    if directions < 1:
        raise ValueError(f"directions: expected at least 1, got {directions}")
    if isinstance(features, Frozen):
        return PrincipalClassifier(features.width, directions, num_classes, features)
    name, options = _named(features)
    if name == "patches":
        reader = Patches(in_channels, image_size, **_of_patches(options))
        return PrincipalClassifier(reader.width, directions, num_classes, reader)
    if name != "pixels":
        raise ValueError(f"features: {name!r} is a network, which fedkd.network builds with them")
    return PrincipalClassifier(in_channels * image_size**2, directions, num_classes)


def body_of(name: str, options: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """Name and options of the network that an entry takes its features from; None: it has none.

    Raises:
        ValueError: features that there are not.
    """
    if name != LINEAR:
        return None
    inner, rest = _named(options.get("features", "pixels"))
    if inner == "patches":
        _of_patches(rest)
        return None
    if inner == "pixels":
        if rest:
            raise ValueError(f"features: pixels have no options, got {rest}")
        return None
    return inner, rest


def seen_by(name: str, options: Mapping[str, Any]) -> str:
    """What decides the features of an entry, for people; empty where it learns them itself."""
    if name != LINEAR:
        return ""
    inner, rest = _named(options.get("features", "pixels"))
    if inner in ("pixels", "patches"):
        return f"directions of the transfer images' {inner}"
    return f"features of {inner} ({rest.get('weights', 'its folder')})"


def _named(features: Any) -> tuple[str, dict[str, Any]]:
    given = {"name": features} if isinstance(features, str) else features
    if not isinstance(given, Mapping) or not isinstance(given.get("name"), str):
        raise ValueError(
            "features: expected pixels, patches, or a network with weights such as {name: resnet8, "
            f"weights: body.pt}}, got {features!r}"
        )
    return given["name"], {key: value for key, value in given.items() if key != "name"}


def _of_patches(options: Mapping[str, Any]) -> dict[str, int]:
    count = options.get("centres", 200)
    if set(options) - {"centres"} or not isinstance(count, int) or isinstance(count, bool):
        raise ValueError(
            f"features: patches have one option, centres (a whole number), got {dict(options)}"
        )
    return {"centres": count}
