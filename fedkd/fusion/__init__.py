"""Fusion rules: one rule, one module; the file is called as in the config."""

from fedkd.fusion.base import Fusion
from fedkd.registry import Registry

FUSIONS: Registry[Fusion] = Registry(
    "fusion",
    "fedkd.fusion",
    gone={
        "cka_alignment": "it gave no better labels than uniform; take entropy or coverage",
        "clusters": "it fused to the same labels as uniform; take uniform",
        "merge": "take enhanced_era with beta: 1, which is the same",
        "validation_accuracy": "it gave no better labels than uniform; take learned_gate",
    },
)
