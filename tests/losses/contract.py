"""A made-up batch for any registered loss, and a call of it."""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from fedkd.knowledge.extract import extract
from fedkd.knowledge.kinds import ClassCosts, Classifier, ClassMaps, Kind, Logits, VirtualLogits
from fedkd.knowledge.payload import Ensemble, Teacher
from fedkd.losses import LOSSES
from fedkd.losses.base import DistillationLoss, EnsembleLoss, TeacherWeights
from fedkd.losses.fixmatch import FixMatchLoss
from fedkd.models.build import build_model
from fedkd.models.network import Network

NAMES = LOSSES.names()
SINGLE = [name for name in NAMES if isinstance(LOSSES.create(name), DistillationLoss)]
TOGETHER = [name for name in NAMES if name not in SINGLE]
Loss = DistillationLoss | EnsembleLoss
Batch = tuple[dict[Kind, Tensor], dict[Kind, Tensor], Tensor, Tensor]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal numbers, the same for the same seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def rand(*shape: int, seed: int = 1) -> Tensor:
    """Numbers from zero to one, such as weights."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@cache
def small_network(width: int, classes: int) -> Network:
    return build_model(
        "cnn_small", num_classes=classes, in_channels=1, image_size=16, mean=[0.5], std=[0.2],
        seed=width, options={"width": width, "norm": "batch"},
    )  # fmt: skip


def batch(loss: Loss, size: int = 6, classes: int = 5, seed: int = 0) -> Batch:
    """Student, teacher, targets and weights of a made-up batch, read from two small networks."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (size, 1, 16, 16), generator=generator, dtype=torch.uint8)

    def read(width: int, kinds: tuple[Kind, ...]) -> dict[Kind, Tensor]:
        network = small_network(width, classes)
        found = extract(network, images, kinds, views=lambda _number: images.flip(3))
        if isinstance(loss, FixMatchLoss) and found:  # untrained networks are sure of nothing
            found[Logits()] = 1e4 * found[Logits()]
        return found

    targets = torch.randint(classes, (size,), generator=generator)
    weights = torch.rand(size, generator=generator)
    return read(4, loss.reads), read(8, loss.needs), targets, weights


def adapted(loss: Loss, student: dict[Kind, Tensor], *teachers: dict[Kind, Tensor]) -> Loss:
    """The loss fitted to these shapes, with the same parameters each time."""
    torch.manual_seed(0)
    if isinstance(loss, EnsembleLoss):
        loss = loss.adapted(student, teachers)
    elif loss.needs:
        loss = loss.adapted(student, teachers[0])
    # Batch norm cannot train on a single number per channel, and training never shows it one.
    return loss.train(len(next(iter(student.values()))) > 1)


def call(
    loss: Loss,
    student: dict[Kind, Tensor],
    teacher: dict[Kind, Tensor],
    targets: Tensor,
    weights: Tensor,
) -> Tensor:
    seen = targets if loss.needs_targets else None
    if isinstance(loss, EnsembleLoss):
        alone = {kind: tensor[None] for kind, tensor in teacher.items()}
        ensemble = Ensemble((Teacher(0),), alone, torch.ones_like(weights)[None])
        return loss(student, ensemble, seen)
    value: Tensor = loss(student, teacher, seen, TeacherWeights(weights))
    return value


def run(
    loss: Loss,
    student: dict[Kind, Tensor],
    teacher: dict[Kind, Tensor],
    targets: Tensor,
    weights: Tensor,
) -> tuple[Tensor, Tensor, dict[Kind, Tensor]]:
    """Raw value, what the objective makes of it, and the gradients."""
    loss = adapted(loss, student, teacher)
    student = {kind: tensor.clone().requires_grad_() for kind, tensor in student.items()}
    value = call(loss, student, teacher, targets, weights)
    reduced = value if value.ndim == 0 else (value * weights).mean()
    reduced.backward()
    gradients = {}
    for kind, tensor in student.items():
        assert tensor.grad is not None, f"no gradient reaches {kind}"
        assert tensor.grad.dtype == tensor.dtype
        assert tensor.grad.isfinite().all(), f"the gradient of {kind} is not finite"
        gradients[kind] = tensor.grad
    assert value.isfinite().all()
    return value.detach(), reduced.detach(), gradients


def in_order(
    tensors: dict[Kind, Tensor], rows: Tensor, classes: Tensor | None = None
) -> dict[Kind, Tensor]:
    """Samples in another order, and classes too."""
    moved = each(tensors, lambda t: t[rows])
    if classes is not None:
        for kind, tensor in moved.items():
            if isinstance(kind, Logits | VirtualLogits | ClassMaps):
                moved[kind] = tensor[:, classes]
            elif isinstance(kind, ClassCosts):
                moved[kind] = tensor[classes][:, classes]
            elif isinstance(kind, Classifier):
                moved[kind] = tensor[classes]
    return moved


def each(tensors: dict[Kind, Tensor], change: Callable[[Tensor], Tensor]) -> dict[Kind, Tensor]:
    """`change` applied to tensors of samples; statistics of the teacher stay."""
    return {kind: change(t) if kind.per_sample else t for kind, t in tensors.items()}


# Options by which a loss computes in another way.
VARIANTS: list[tuple[str, dict[str, object]]] = [
    *((name, {}) for name in NAMES),
    ("kd", {"standardise": True}),
    ("dkd", {"standardise": True}),
    ("dist", {"eps_mode": "add", "temperature": 1.0, "eps": 1e-2}),
    ("vrm", {"edges": "full", "distance": "edge_huber", "delta": 0.3}),
    ("vrm", {"edges": "real", "distance": "huber", "delta": 0.1, "standardise": False}),
    ("vrm", {"distance": "masked", "reduction": "elements"}),
    ("vrm", {"edges": "full", "pruning": "edge_discrepancy", "rho": 0.3}),
    ("rkd", {"squared": True, "space": "logits"}),
    ("rkd", {"angle_weight": 0.0}),
    ("sp", {"space": "features"}),
    ("relation", {"relation": "gram", "normalisation": "rows", "standardise": True}),
    ("relation", {"relation": "direction", "vertices": "classes_over_views"}),
    ("relation", {"relation": "angle", "distance": "squared"}),
    ("relation", {"vertices": "classes", "distance": "huber", "delta": 0.5}),
    ("relation", {"normalisation": "mean", "vertices": "samples_and_views"}),
    ("relation", {"normalisation": "rows", "distance": "squared"}),
    ("relation", {"vertices": "samples_and_views", "relation": "direction", "distance": "pearson"}),
    ("relation", {"relation": "identity"}),
    ("cka", {"similarity": "rbf"}),
    ("cka", {"similarity": "unbiased"}),
    ("wkd_l", {"separate_target": False, "debiased": True, "kappa": 2.0}),
    ("wkd_l", {"debiased": True, "kappa": 0.0}),
    ("wkd_f", {"grid": 3}),
    ("wkd_f", {"covariance": "full"}),
    ("cat", {"normalise": False, "keep": 2}),
    ("london", {"gradient": "unrolled", "relative": True}),
    ("camkd", {"feature_weight": 50.0}),
    ("camkd", {"feature_weight": 50.0, "through_weights": True}),
    ("hcd", {"detach": False, "orthogonal": "sub"}),
    ("ebkd", {"scale": "published"}),
    ("dgkd", {"combine": "sum", "reduction": "elementwise"}),
]


def title(variant: tuple[str, dict[str, object]]) -> str:
    """Of a test case."""
    name, options = variant
    return "-".join([name, *map(str, options.values())])
