"""Fusion rules: one rule, one module; the file is called as in the config."""

from fedkd.fusion.base import Fusion
from fedkd.registry import Registry

FUSIONS: Registry[Fusion] = Registry("fusion", "fedkd.fusion")
