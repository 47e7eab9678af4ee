"""May this model be trained with DP-SGD? Looked at, and then tried, on random images.

DP-SGD bounds what one image can do to the sum of clipped gradients. That holds only if each
image's gradient is its own and is read rightly. Opacus accepts models for which it is not:
batch norm without trainable parameters, convolutions with another padding than zeros or with
channels last, layers that centre their features over the batch, weights used behind the hooks'
back. So every private model is checked at start-up, by its parts and by its behaviour.

Nothing private is read: the images are random, the same in every check.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm

from fedkd.models import MODELS
from fedkd.models.linear import Frozen
from fedkd.models.network import Network
from fedkd.models.peft import AttentionLoRA
from fedkd.privacy.clipping import ClippedSteps, Clipping, Criterion
from fedkd.randomness import seeded

# Single precision, in another order of summation, stays far below; the traps are at 1 % and more.
TOLERANCE = 1e-3
EXAMPLES = 5
# What may be frozen, where only adapters learn, but may not learn itself.
_WITHOUT = (_BatchNorm, nn.MultiheadAttention, AttentionLoRA)


def example_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy per example, (B, C) x (B,) -> (B,)."""
    return functional.cross_entropy(logits, labels, reduction="none")


def check_private(
    network: Network,
    image_shape: tuple[int, int, int],
    num_classes: int,
    *,
    name: str | None = None,
    clipping: Clipping = "hooks",
    criterion: Criterion = example_cross_entropy,
) -> None:
    """Refuse a model that DP-SGD would train without keeping its promise.

    Args:
        network: Stays as it is; a copy is tried.
        image_shape: (channels, height, width).
        num_classes: Width of the logits.
        name: The model's name in the config, for the message.
        clipping: How the gradients will be clipped.
        criterion: The loss that will be minimised, (logits, labels) -> one value per example.

    Raises:
        ValueError: with the reasons, and a model to take instead if it is known.
    """
    reasons = list(static_problems(network, clipping))
    if not reasons:
        with seeded(0, "private check"):
            reasons = _tried(network, image_shape, num_classes, clipping, criterion)
    if reasons:
        what = repr(name) if name else type(network.body).__name__
        listed = "; ".join(reasons[:3])
        if len(reasons) > 3:
            listed += f"; and {len(reasons) - 3} more reasons"
        instead = _instead(name) if network.base is None else "Take peft method adapter or head"
        raise ValueError(f"model {what} cannot be trained privately: {listed}. {instead}")


def static_problems(network: nn.Module, clipping: Clipping) -> Iterator[str]:
    """Reasons that can be read off the network's parts."""
    adapted = isinstance(network, Network) and network.base is not None
    still = {
        part
        for module in network.modules()
        if isinstance(module, Frozen) and not any(p.requires_grad for p in module.parameters())
        for part in module.modules()
    }
    for path, module in network.named_modules():
        if module in still:  # in evaluation mode, and without a gradient
            continue
        part = f"{path} ({type(module).__name__})"
        if isinstance(module, _BatchNorm) and not (adapted and module.track_running_stats):
            yield f"{part} mixes the images of a batch, also when frozen or without parameters"
        elif adapted and isinstance(module, _WITHOUT) and _learns(module):
            yield f"{part} learns, and Opacus has no gradients of it for each image"
        if isinstance(module, _InstanceNorm) and module.track_running_stats:
            yield f"{part} keeps running statistics of private images, to which no noise is added"
        if isinstance(module, _ConvNd) and module.padding_mode != "zeros":
            yield (
                f"{part} has padding_mode={module.padding_mode!r}, which Opacus ignores: the "
                "gradients it clips would be wrong"
            )
        if getattr(module, "inplace", False):
            yield f"{part} works in place, which Opacus' hooks cannot follow"
    for path, parameter in network.named_parameters():
        is_last = parameter.ndim == 4 and parameter.is_contiguous(memory_format=torch.channels_last)
        if is_last and not parameter.is_contiguous():
            yield (
                f"{path} is in channels_last memory format, which Opacus reads as if it were "
                "contiguous: the gradients it clips would be wrong"
            )
    if not any(parameter.requires_grad for parameter in network.parameters()):
        yield "no parameter is trainable"
    if clipping == "ghost":
        first: dict[int, str] = {}
        for path, parameter in network.named_parameters(remove_duplicate=False):
            before = first.setdefault(id(parameter), path)
            if before != path:
                yield f"{before} and {path} share a weight, which needs clipping: hooks"


def _learns(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters(recurse=False))


def _tried(
    network: Network,
    image_shape: tuple[int, int, int],
    num_classes: int,
    clipping: Clipping,
    criterion: Criterion,
) -> list[str]:
    """Reasons that show when the network is run, forward and then backward."""
    tried = copy.deepcopy(network).train()
    device = next(network.parameters()).device
    with torch.no_grad():
        for parameter in tried.parameters():  # zeros, in which mistakes would hide
            parameter.add_(0.02 * torch.randn(parameter.shape).to(device))
    images = torch.randint(256, (EXAMPLES, *image_shape), dtype=torch.uint8).to(device)
    labels = torch.randint(num_classes, (EXAMPLES,)).to(device)
    reasons = [*_forward_problems(tried, images), *_loss_problems(criterion, labels, num_classes)]
    if reasons:
        return reasons
    try:
        if unused := _unused(tried, criterion, images, labels):
            return [f"parameter {unused} is not used; freeze it with requires_grad_(False)"]
        # With dropout, as in training: layers that Opacus hands to vmap cannot draw.
        with _steps(copy.deepcopy(tried), criterion, clipping, 1.0) as steps:
            steps.step([(images, labels)])
        _still(tried)
        if not _close(*(_seen(tried, images, draw) for draw in (1, 2))):
            return ["it draws random numbers by other means than nn.Dropout, so it cannot be tried"]
        return list(_gradient_problems(tried, criterion, clipping, images, labels))
    # Whatever foreign code and hooks raise, the user needs to hear which model it was.
    except Exception as error:
        return [f"Opacus cannot give its gradients ({type(error).__name__}: {error})"]


def _forward_problems(network: nn.Module, images: Tensor) -> Iterator[str]:
    """What a pass in training mode leaves behind, and whether images see each other."""
    buffers = {path: buffer.clone() for path, buffer in network.named_buffers()}

    before = _seen(network, images)
    remembers = not _close(_seen(network, images), before)
    mixed = False
    for place in (0, len(images) - 1):
        changed = images.clone()
        changed[place] = 255 - images[place]
        others = torch.arange(len(images), device=images.device) != place
        mixed |= not _close(_seen(network, changed)[others], before[others])
    if mixed and not remembers:
        yield "the output for one image depends on the other images of the batch"
    touched = [
        path for path, buffer in network.named_buffers() if not torch.equal(buffers[path], buffer)
    ]
    for path in touched:
        yield f"buffer {path} changes in training, without noise: it would tell of private images"
    if remembers and not touched:
        yield "the network keeps a memory of the images it has seen before"


def _seen(network: nn.Module, images: Tensor, draw: int = 0) -> Tensor:
    """Logits in training mode, with the same random numbers for the same `draw`."""
    with torch.no_grad(), seeded(draw, "pass"):
        logits: Tensor = network(images)
    return logits


def _loss_problems(criterion: Criterion, labels: Tensor, num_classes: int) -> Iterator[str]:
    logits = torch.randn(len(labels), num_classes, device=labels.device)
    losses = criterion(logits, labels)
    if losses.shape != labels.shape:
        yield (
            f"the loss gives {tuple(losses.shape)} for {len(labels)} examples instead of one value "
            "for each, so their gradients cannot be separated"
        )
        return
    for place in (0, len(labels) - 1):
        changed = logits.clone()
        changed[place] += 3 * torch.randn(num_classes, device=labels.device)
        others = torch.arange(len(labels), device=labels.device) != place
        if not _close(criterion(changed, labels)[others], losses[others]):
            yield "the loss of one example depends on the other examples of the batch"
            return


def _gradient_problems(
    network: nn.Module, criterion: Criterion, clipping: Clipping, images: Tensor, labels: Tensor
) -> Iterator[str]:
    """Opacus' gradients and clipped sums against those of one image after the other."""
    names = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
    rows = [
        _alone(network, criterion, images[i : i + 1], labels[i : i + 1]) for i in range(len(images))
    ]
    single = {name: torch.stack([row[name] for row in rows]) for name in names}
    norms = _norms(single)
    largest = float(norms.max())
    if largest == 0:
        yield "no image gives a gradient"
        return
    if clipping == "hooks":
        with _steps(network, criterion, "hooks", 1.0) as steps:
            read = steps.per_example(images, labels)
        off = {
            name: float((read[name] - single[name]).flatten(1).norm(dim=1).max()) for name in names
        }
        worst = max(off, key=lambda name: off[name])
        if not off[worst] <= TOLERANCE * largest:
            yield (
                f"Opacus' gradients of {worst} for each image are wrong by "
                f"{off[worst] / largest:.2g} of the whole gradient"
            )
            return
    # Half of the images are clipped: both branches are seen.
    bound = float(norms.median()) or largest
    factors = (bound / (norms + 1e-6)).clamp(max=1.0)  # as Opacus does
    expected = {name: torch.einsum("b,b...->...", factors, single[name]) for name in names}
    with _steps(network, criterion, clipping, bound) as steps:
        whole = _sum(steps, network, images, labels)
        error = _distance(whole, expected)
        if not error <= TOLERANCE * bound * len(images):
            yield f"the sum of clipped gradients is wrong by {error / bound:.2g} clipping norms"
        for place in range(len(images)):
            others = torch.arange(len(images), device=images.device) != place
            moved = _distance(whole, _sum(steps, network, images[others], labels[others]))
            if not moved <= (1 + TOLERANCE) * bound:
                yield (
                    f"one image moves the sum of clipped gradients by {moved / bound:.4g} clipping "
                    "norms, more than the noise accounts for"
                )
                return


def _alone(
    network: nn.Module, criterion: Criterion, image: Tensor, label: Tensor
) -> dict[str, Tensor]:
    """Gradient of one image by plain backward, name -> tensor of the parameter's shape."""
    trainable = {name: p for name, p in network.named_parameters() if p.requires_grad}
    loss = criterion(network(image), label).sum()
    return dict(zip(trainable, torch.autograd.grad(loss, list(trainable.values()))))


def _unused(network: nn.Module, criterion: Criterion, images: Tensor, labels: Tensor) -> str | None:
    """The first trainable parameter that the loss does not depend on."""
    trainable = {name: p for name, p in network.named_parameters() if p.requires_grad}
    loss = criterion(network(images), labels).sum()
    gradients = torch.autograd.grad(loss, list(trainable.values()), allow_unused=True)
    missing = (name for name, gradient in zip(trainable, gradients) if gradient is None)
    return next(missing, None)


def _steps(
    network: nn.Module, criterion: Criterion, clipping: Clipping, bound: float
) -> ClippedSteps:
    """The steps of training, without noise and without moving."""
    return ClippedSteps(
        network,
        criterion,
        torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.0),
        noise_multiplier=0.0,
        max_grad_norm=bound,
        expected_batch_size=1.0,
        clipping=clipping,
    )


def _sum(
    steps: ClippedSteps, network: nn.Module, images: Tensor, labels: Tensor
) -> dict[str, Tensor]:
    steps.step([(images, labels)])
    return {
        name: p.grad.clone()
        for name, p in network.named_parameters()
        if p.requires_grad and p.grad is not None
    }


def _norms(gradients: dict[str, Tensor]) -> Tensor:
    """name -> (B, ...) to the norm of each example's whole gradient, (B,)."""
    parts = [gradient.flatten(1).norm(dim=1) for gradient in gradients.values()]
    return torch.stack(parts).norm(dim=0)


def _distance(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    parts = [(first[name] - second[name]).norm() for name in first]
    return float(torch.stack(parts).norm())


def _still(network: nn.Module) -> None:
    """Switch dropout off: two passes can be compared only if they draw the same."""
    for module in network.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0


def _close(first: Tensor, second: Tensor) -> bool:
    """Up to rounding, measured by the largest value: small outputs may not hide a dependence."""
    return float((first - second).abs().max()) <= 1e-5 * float(second.abs().max())


def _instead(name: str | None) -> str:
    if name in MODELS.names() and "norm" in MODELS.options(name):
        return f"Take {{name: {name}, norm: group}}"
    return "Take for example {name: cnn_small, norm: group}"
