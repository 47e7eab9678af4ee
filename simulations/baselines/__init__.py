"""What others do, on our split, seed and networks: one baseline, one module."""

from fedkd.registry import Registry
from fedkd.simulations.baselines.base import Baseline

BASELINES: Registry[Baseline] = Registry("baseline", "fedkd.simulations.baselines")
