"""fedkd: distil many private teachers into one small student.

The library knows no Flower; `fedkd.strategies` and `fedkd.simulations` bring it to a federation.
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

# `strategies/`, `simulations/` and `configs/` are links to the folders beside this one. Flower's
# app bundle (FAB) leaves links out.
if not Path(__file__).with_name("strategies").is_dir():
    __path__.append(str(Path(__file__).parents[1]))

__version__ = "0.1.0"

if TYPE_CHECKING:  # `X as X`: re-exported, for type checkers
    from fedkd.api import inspect as inspect
    from fedkd.api import network as network
    from fedkd.api import train_student as train_student
    from fedkd.api import train_teacher as train_teacher
    from fedkd.config import Experiment as Experiment
    from fedkd.config import load_experiment as load_experiment
    from fedkd.config import make_experiment as make_experiment
    from fedkd.data.datasets import load_dataset as load_dataset
    from fedkd.data.images import ImageSet as ImageSet
    from fedkd.data.splits import federate as federate
    from fedkd.distillation.objective import Objective as Objective
    from fedkd.distillation.objective import Term as Term
    from fedkd.distillation.trainer import distill as distill
    from fedkd.fusion import FUSIONS as FUSIONS
    from fedkd.fusion.base import Fusion as Fusion
    from fedkd.knowledge.kinds import Logits as Logits
    from fedkd.knowledge.kinds import VirtualLogits as VirtualLogits
    from fedkd.knowledge.payload import Ensemble as Ensemble
    from fedkd.losses import LOSSES as LOSSES
    from fedkd.losses.base import DistillationLoss as DistillationLoss
    from fedkd.models import MODELS as MODELS
    from fedkd.models.network import Network as Network
    from fedkd.runs.students import load_student as load_student
    from fedkd.training.evaluation import evaluate as evaluate
    from fedkd.training.optimizers import Optimizer as Optimizer

_PUBLIC = {
    "inspect": "api",
    "network": "api",
    "train_student": "api",
    "train_teacher": "api",
    "Experiment": "config",
    "Optimizer": "training.optimizers",
    "load_experiment": "config",
    "make_experiment": "config",
    "load_dataset": "data.datasets",
    "load_student": "runs.students",
    "ImageSet": "data.images",
    "federate": "data.splits",
    "distill": "distillation.trainer",
    "evaluate": "training.evaluation",
    "FUSIONS": "fusion",
    "Fusion": "fusion.base",
    "Logits": "knowledge.kinds",
    "VirtualLogits": "knowledge.kinds",
    "Ensemble": "knowledge.payload",
    "LOSSES": "losses",
    "DistillationLoss": "losses.base",
    "MODELS": "models",
    "Network": "models.network",
    "Objective": "distillation.objective",
    "Term": "distillation.objective",
}

__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> Any:
    """Public names, imported on first use: `import fedkd` costs no torch."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'fedkd' has no attribute {name!r}")
    return getattr(importlib.import_module(f"fedkd.{_PUBLIC[name]}"), name)
