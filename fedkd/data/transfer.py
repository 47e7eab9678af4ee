"""The transfer set: the common images about which knowledge is shared."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fedkd.data.images import ImageSet


@dataclass(frozen=True)
class TransferSet:
    """Images that every machine holds.

    Attributes:
        images: The images; with labels only if the student may learn from them.
        true_labels: Hidden labels, (N,), to judge pseudo-labels by and for nothing else; None
            where the images have none or come from other classes.
        fingerprint: Hash of the images, equal on two machines iff the images are.
    """

    images: ImageSet
    true_labels: Tensor | None
    fingerprint: str

    @property
    def labelled(self) -> bool:
        """Whether the student may use labels."""
        return self.images.labels is not None

    def __len__(self) -> int:
        return len(self.images)


def conform(images: ImageSet, shape: tuple[int, int, int]) -> ImageSet:
    """`images` in the given (channels, height, width): resized, made grey or repeated as colour.

    Pillow computes in whole numbers, so the result is the same on every machine (torch's uint8
    resize differs between processors, and the fingerprint with it).

    Raises:
        ValueError: a number of channels other than 1 or 3.
    """
    if images.shape == shape:
        return images
    from PIL import Image

    channels, height, width = shape
    if channels not in (1, 3) or images.shape[0] not in (1, 3):
        raise ValueError(
            f"images of shape {images.shape} cannot become {shape}: 1 or 3 channels only"
        )
    pixels = torch.empty((len(images), *shape), dtype=torch.uint8)
    for row, image in enumerate(images.images):
        array = image.permute(1, 2, 0).numpy()
        picture = Image.fromarray(array[..., 0] if len(image) == 1 else np.ascontiguousarray(array))
        picture = picture.convert("L" if channels == 1 else "RGB")
        if picture.size != (width, height):
            picture = picture.resize((width, height), Image.Resampling.BILINEAR)
        array = np.array(picture).reshape(height, width, channels)
        pixels[row] = torch.from_numpy(array).permute(2, 0, 1)
    return replace(images, images=pixels)
