"""Image classifiers by name, and the one wrapper (`Network`) that taps them.

A model is a function `(num_classes, in_channels, image_size, *, options) -> nn.Module` that
maps normalised float images (B, in_channels, image_size, image_size) to logits (B, C), and
declares where to tap it with two attributes: `stages` (submodule names, shallow to deep) and
`head_name` (the classification layer).
"""

from torch import nn

from fedkd.registry import Registry

MODELS: Registry[nn.Module] = Registry("model", "fedkd.models")
