"""How knowledge is written for the wire: one codec, one module."""

from fedkd.knowledge.codecs.base import Codec
from fedkd.registry import Registry

CODECS: Registry[Codec] = Registry("codec", "fedkd.knowledge.codecs")
