"""Distillation losses: one paper, one module; the file is called as in the config."""

from fedkd.losses.base import DistillationLoss, EnsembleLoss
from fedkd.registry import Registry

LOSSES: Registry[DistillationLoss | EnsembleLoss] = Registry("loss", "fedkd.losses")
