"""fedkd: distil many private teachers into one small student.

The library knows no Flower; `strategies` and `simulations` bring it to a federation.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fedkd.api import network, train_student, train_teacher
    from fedkd.config import Experiment, Optimizer, load_experiment, make_experiment
    from fedkd.data.datasets import load_dataset
    from fedkd.data.images import ImageSet
    from fedkd.data.splits import federate
    from fedkd.distillation import distill
    from fedkd.evaluation import evaluate
    from fedkd.fusion import FUSIONS
    from fedkd.fusion.base import Fusion
    from fedkd.knowledge.kinds import Logits, VirtualLogits
    from fedkd.knowledge.payload import Ensemble
    from fedkd.losses import LOSSES
    from fedkd.losses.base import DistillationLoss
    from fedkd.models import MODELS
    from fedkd.models.network import Network
    from fedkd.objective import Objective, Term

_PUBLIC = {
    "network": "api",
    "train_student": "api",
    "train_teacher": "api",
    "Experiment": "config",
    "Optimizer": "config",
    "load_experiment": "config",
    "make_experiment": "config",
    "load_dataset": "data.datasets",
    "ImageSet": "data.images",
    "federate": "data.splits",
    "distill": "distillation",
    "evaluate": "evaluation",
    "FUSIONS": "fusion",
    "Fusion": "fusion.base",
    "Logits": "knowledge.kinds",
    "VirtualLogits": "knowledge.kinds",
    "Ensemble": "knowledge.payload",
    "LOSSES": "losses",
    "DistillationLoss": "losses.base",
    "MODELS": "models",
    "Network": "models.network",
    "Objective": "objective",
    "Term": "objective",
}

__all__ = [*_PUBLIC, "__version__"]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    """Public names, imported on first use: `import fedkd` costs no torch."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'fedkd' has no attribute {name!r}")
    return getattr(importlib.import_module(f"fedkd.{_PUBLIC[name]}"), name)
