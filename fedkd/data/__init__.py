"""Images: where they come from, who holds them, and the transfer set everybody shares."""

from typing import TYPE_CHECKING, Any

from fedkd.registry import Registry

if TYPE_CHECKING:  # configs know the registries, and reading one costs no torch
    from fedkd.data.images import ImageSet

DATASETS: "Registry[tuple[ImageSet, ...]]" = Registry("data set", "fedkd.data")
#: Functions `(labels, clients, seed, *, options) -> rows`: from the class of every example, the
#: number of parts and the seed of the draw, the positions in each part.
PARTITIONS: Registry[Any] = Registry("partition", "fedkd.data.partitions")
#: Functions `(turn, *, options) -> clients`: those that a round may ask, in the order in which they
#: are taken.
SAMPLERS: Registry[Any] = Registry("sampler", "fedkd.data.cohorts")
#: Functions `(images, generator, *, options) -> uint8 (N, channels, height, width)`: the pixels of
#: images in another domain.
SHIFTS: Registry[Any] = Registry("shift", "fedkd.data.domains")

__all__ = ["DATASETS", "PARTITIONS", "SAMPLERS", "SHIFTS"]
