"""Small networks that cut the image into patches: an MLP-Mixer and a vision transformer.

Their stage features are maps too, (B, width, grid, grid): one place per patch.

References:
    Tolstikhin et al., "MLP-Mixer", NeurIPS 2021, https://arxiv.org/abs/2105.01601
    Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021,
    https://arxiv.org/abs/2010.11929
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedkd.models import MODELS


def patch_size(image_size: int, patch: int | None) -> int:
    """`patch` if it divides the image; None takes the smallest that leaves at most 8x8 patches.

    Raises:
        ValueError: the patches would not cover the image.
    """
    if patch is None:
        divisors = (side for side in range(2, image_size + 1) if image_size % side == 0)
        return next((side for side in divisors if image_size // side <= 8), 1)
    if patch < 1 or image_size % patch:
        raise ValueError(f"patch: expected a divisor of the image size {image_size}, got {patch}")
    return patch


def _two_layers(inputs: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, inputs))


class MixerBlock(nn.Module):
    """Mixes the patches of each channel, then the channels of each patch."""

    def __init__(self, patches: int, width: int) -> None:
        super().__init__()
        self.norm_patches = nn.LayerNorm(width)
        self.mix_patches = _two_layers(patches, 2 * patches)
        self.norm_channels = nn.LayerNorm(width)
        self.mix_channels = _two_layers(width, 2 * width)

    def forward(self, maps: Tensor) -> Tensor:
        """(B, width, grid, grid) -> the same; a map, so that losses on stages can read it."""
        x = maps.flatten(2).transpose(1, 2)
        x = x + self.mix_patches(self.norm_patches(x).transpose(1, 2)).transpose(1, 2)
        x = x + self.mix_channels(self.norm_channels(x))
        return x.transpose(1, 2).unflatten(2, maps.shape[2:])


class AsMap(nn.Module):
    """Patches laid out as a map: a tap, it computes nothing."""

    def __init__(self, grid: int) -> None:
        super().__init__()
        self.grid = grid
        self.map = nn.Identity()

    def forward(self, patches: Tensor) -> Tensor:
        """(B, grid * grid, width) -> (B, width, grid, grid)."""
        out: Tensor = self.map(patches.transpose(1, 2).unflatten(2, (self.grid, self.grid)))
        return out


class Mixer(nn.Module):
    """Patch embedding, mixer blocks, mean over the patches and a linear head."""

    head_name = "head"
    final_name = "final.map"

    def __init__(
        self, in_channels: int, patch: int, grid: int, width: int, depth: int, num_classes: int
    ) -> None:
        super().__init__()
        self.embed = nn.Conv2d(in_channels, width, patch, stride=patch)
        self.blocks = nn.Sequential(*(MixerBlock(grid**2, width) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.final = AsMap(grid)
        self.head = nn.Linear(width, num_classes)
        self.stages = ("embed", *(f"blocks.{number}" for number in range(depth)))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, C) of normalised images (B, channels, h, w)."""
        maps = self.blocks(self.embed(images))
        patches = self.norm(maps.flatten(2).transpose(1, 2))
        self.final(patches)  # called for its hook alone
        logits: Tensor = self.head(patches.mean(1))
        return logits


@MODELS.register("mixer")
def mixer(
    num_classes: int,
    in_channels: int,
    image_size: int,
    *,
    width: int = 32,
    depth: int = 4,
    patch: int | None = None,
) -> nn.Module:
    """Small MLP-Mixer.

    Args:
        width: Channels of a patch.
        depth: Number of blocks.
        patch: Side of a patch; None takes the smallest that leaves at most 8x8 patches.
    """
    side = patch_size(image_size, patch)
    return Mixer(in_channels, side, image_size // side, width, depth, num_classes)


class TransformerBlock(nn.Module):
    """Self-attention and two linear layers, each after a layer norm and added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(width)
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.norm_feed = nn.LayerNorm(width)
        self.feed = _two_layers(width, 4 * width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, tokens, width) -> the same."""
        mixed = self.queries_keys_values(self.norm_attention(x))
        # (B, tokens, 3 * width) -> three of (B, heads, tokens, width / heads)
        q, k, v = mixed.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.project(attended)
        out: Tensor = x + self.feed(self.norm_feed(x))
        return out


class VisionTransformer(nn.Module):
    """Patch embedding, class token, learned positions, pre-norm blocks and a linear head.

    The head reads the class token, but it can be applied to the patches just as well: that is its
    map.
    """

    head_name = "head"
    final_name = "final.map"

    def __init__(
        self,
        in_channels: int,
        patch: int,
        grid: int,
        width: int,
        depth: int,
        heads: int,
        num_classes: int,
    ) -> None:
        super().__init__()
        self.embed = nn.Conv2d(in_channels, width, patch, stride=patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.empty(1, 1 + grid**2, width))
        nn.init.trunc_normal_(self.positions, std=0.02)
        self.blocks = nn.ModuleList(TransformerBlock(width, heads) for _ in range(depth))
        self.maps = nn.ModuleList(AsMap(grid) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.final = AsMap(grid)
        self.head = nn.Linear(width, num_classes)
        self.stages = ("embed", *(f"maps.{number}" for number in range(depth)))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, C) of normalised images (B, channels, h, w)."""
        patches = self.embed(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_token.expand(patches.shape[0], -1, -1), patches], 1)
        tokens = tokens + self.positions
        for block, as_map in zip(self.blocks, self.maps):
            tokens = block(tokens)
            as_map(tokens[:, 1:])  # called for its hook alone: blocks themselves return no map
        tokens = self.norm(tokens)
        self.final(tokens[:, 1:])
        logits: Tensor = self.head(tokens[:, 0])
        return logits


@MODELS.register("vit_tiny")
def vit_tiny(
    num_classes: int,
    in_channels: int,
    image_size: int,
    *,
    width: int = 32,
    depth: int = 4,
    heads: int = 4,
    patch: int | None = None,
) -> nn.Module:
    """Small vision transformer with a class token.

    Args:
        width: Channels of a token.
        depth: Number of blocks.
        heads: Attention heads; must divide `width`.
        patch: Side of a patch; None takes the smallest that leaves at most 8x8 patches.

    Raises:
        ValueError: `heads` does not divide `width`, or `patch` does not divide the image.
    """
    if width % heads:
        raise ValueError(f"heads: expected a divisor of the width {width}, got {heads}")
    side = patch_size(image_size, patch)
    return VisionTransformer(
        in_channels, side, image_size // side, width, depth, heads, num_classes
    )
