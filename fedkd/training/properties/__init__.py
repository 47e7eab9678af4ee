"""What a student may have taken over from its teachers: one property, one module.

`fedkd.training.properties.compare` measures them on a teacher, a distilled student and independent
ones. The protocol follows Ojha et al., "What Knowledge Gets Distilled in Knowledge Distillation?",
NeurIPS 2023, https://arxiv.org/abs/2205.16004
"""

from fedkd.registry import Registry
from fedkd.training.properties.base import Property

PROPERTIES: Registry[Property] = Registry("property", "fedkd.training.properties")
