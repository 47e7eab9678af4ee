"""Images: where they come from, who holds them, and the transfer set everybody shares."""

from typing import Any

from fedkd.data.images import ImageSet
from fedkd.registry import Registry

DATASETS: Registry[tuple[ImageSet, ImageSet]] = Registry("data set", "fedkd.data")
#: Functions `(labels, clients, seed, *, options) -> rows`: from the class of every example, the
#: number of parts and the seed of the draw, the positions in each part.
PARTITIONS: Registry[Any] = Registry("partition", "fedkd.data")
#: Functions `(turn, *, options) -> clients`: those that a round may ask, in the order in which they
#: are taken.
SAMPLERS: Registry[Any] = Registry("sampler", "fedkd.data")
#: Functions `(images, generator, *, options) -> uint8 (N, channels, height, width)`: the pixels of
#: images in another domain.
SHIFTS: Registry[Any] = Registry("shift", "fedkd.data")

__all__ = ["DATASETS", "PARTITIONS", "SAMPLERS", "SHIFTS", "ImageSet"]
