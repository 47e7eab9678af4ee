"""Images: where they come from, who holds them, and the transfer set everybody shares."""

from fedkd.data.images import ImageSet
from fedkd.registry import Registry

__all__ = ["ImageSet", "Registry"]
