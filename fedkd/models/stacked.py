"""Many networks of one architecture, read at once.

Their weights lie on top of each other, and `torch.func.vmap` reads all of them in the operations
of one. Three things a network does with a batch cannot be left to it: batch norm (each network has
statistics of its own, and must not see the rows that fill up a smaller batch), dropout (each
network draws its own numbers), and whatever else looks at more than one image: there a stack is
refused, and the networks are to be read one after the other.
"""

from __future__ import annotations

import copy
import gc
import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from fedkd.models.network import Network

Draw = Callable[[tuple[int, ...], float, int], Tensor]
"""(shape (K, B, ...), share that is dropped, number of the call) -> 0 or 1 for each, that shape."""

# How far logits may be from those of a network alone, as a share of the largest.
_CLOSE = {"cpu": 1e-3}
_CLOSE_ELSEWHERE = 3e-2  # TensorFloat-32


Result = TypeVar("Result")

_announced: set[tuple[str, str]] = set()

logger = logging.getLogger(__name__)


class Unstackable(ValueError):
    """These networks cannot be read at once; the message says why."""


def in_stacks(
    networks: Sequence[Network],
    keys: Sequence[Hashable],
    together: Callable[[list[int]], Sequence[Result]],
    alone: Callable[[int], Result],
) -> list[Result]:
    """A result for each network: of those with the same key at once, of others one by one.

    Where memory does not hold a group, its halves are tried. One that cannot be stacked is taken
    one by one, which is announced.

    Args:
        networks: All of them.
        keys: Of each; None if it is taken alone.
        together: Numbers of some networks -> their results; leaves no trace if it raises.
        alone: Number of one network -> its result.
    """
    groups: dict[Hashable, list[int]] = {}
    for number, key in enumerate(keys):
        groups.setdefault(("alone", number) if key is None else key, []).append(number)
    found: dict[int, Result] = {}
    waiting = list(groups.values())[::-1]
    while waiting:
        group, full = waiting.pop(), False
        try:
            if len(group) > 1:
                found.update(zip(group, together(group), strict=True))
                continue
        except torch.OutOfMemoryError:
            full = True
        except (Unstackable, RuntimeError) as reason:
            _announce_alone(networks[group[0]], reason)
        if full:  # only now: an error that is being handled holds all that it was raised over
            gc.collect()
            if networks[group[0]].mean.device.type == "cuda":
                torch.cuda.empty_cache()
            half = (len(group) + 1) // 2
            logger.info("no memory for %d clients together, %d are tried", len(group), half)
            waiting += [group[half:], group[:half]]
        else:
            found.update({number: alone(number) for number in group})
    return [found[number] for number in range(len(networks))]


def _announce_alone(network: Network, reason: Exception) -> None:
    """Warn, once for each reason, that networks of this architecture are not stacked."""
    place = type(network.body).__name__, str(reason)
    if place not in _announced:
        _announced.add(place)
        logger.warning("%s is taken client after client: %s", *place)


def architecture(network: Network, together: bool | None = True) -> Hashable:
    """What two networks must have in common to be stacked; None if it cannot be stacked at all.

    Args:
        network: Any.
        together: Whether it is to be stacked; None: on accelerators.
    """
    if not (network.mean.device.type != "cpu" if together is None else together):
        return None
    for module in network.modules():
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
            return None
    parameters = dict(network.named_parameters())
    if any(p._backward_hooks for p in parameters.values()):
        return None
    trained = {p.dtype for p in parameters.values() if p.requires_grad}
    if len(trained) != 1 or not all(dtype.is_floating_point for dtype in trained):
        return None
    state = (*parameters.items(), *network.named_buffers())
    return (
        repr(network),
        tuple(type(module) for module in network.modules()),
        tuple((name, t.shape, t.dtype, t.device, t.requires_grad) for name, t in state),
    )


class Stack:
    """Networks of one architecture, K of them.

    Args:
        networks: At least one; left as they are.
        training: In which mode they are read.

    Attributes:
        weights: What is trained, (K, P): a row for each network.
        state: Buffers and frozen weights by name, each (K, ...).
        base: The architecture, without weights.
    """

    def __init__(self, networks: Sequence[Network], *, training: bool) -> None:
        first = networks[0]
        try:
            self.base = copy.deepcopy(first).to("meta").train(training)
        except Exception as error:  # whatever foreign code raises when it is copied
            raise Unstackable(f"it cannot be copied ({error})") from error
        named = [dict(network.named_parameters()) for network in networks]
        self._places: list[tuple[str, torch.Size]] = [
            (name, p.shape) for name, p in named[0].items() if p.requires_grad
        ]
        rows = [
            torch.cat([own[name].detach().flatten() for name, _ in self._places]) for own in named
        ]
        self.weights = torch.stack(rows)
        rest = [
            {
                **{name: p.detach() for name, p in own.items() if not p.requires_grad},
                **dict(network.named_buffers()),
            }
            for own, network in zip(named, networks, strict=True)
        ]
        # Of networks with one frozen part, that part is there once.
        bases = {network.base for network in networks}
        self._fixed = set(first.frozen()) if len(bases) == 1 and None not in bases else set()
        self.state = {
            name: tensor.expand(len(rest), *tensor.shape)
            if name in self._fixed
            else torch.stack([own[name] for own in rest])
            for name, tensor in rest[0].items()
        }
        self._leaves = self._cut()

    @property
    def shapes(self) -> list[torch.Size]:
        """Of what is trained in each network, in the order of its row."""
        return [shape for _, shape in self._places]

    def __len__(self) -> int:
        return len(self.weights)

    def take(self, rows: Tensor) -> Stack:
        """A stack of its own of some of the networks."""
        taken = copy.copy(self)
        taken.weights = self.weights[rows]
        taken.state = {
            name: t[: len(rows)] if name in self._fixed else t[rows]
            for name, t in self.state.items()
        }
        taken._leaves = taken._cut()
        return taken

    def read(
        self,
        images: Tensor,
        *,
        counts: Tensor | None = None,
        draw: Draw | None = None,
    ) -> Tensor:
        """Logits (K, B, C) of images (K, B, channels, h, w), each network of its own.

        Running statistics in `state` are moved, as a network in training mode moves its own.

        Args:
            images: uint8.
            counts: How many images of each row are there, (K,); the others only fill it up. None:
                all.
            draw: What dropout draws; None: nothing is dropped.
        """
        rows = _Rows(counts, images.shape[1], draw)

        def one(weights: dict[str, Tensor], state: dict[str, Tensor], own: Tensor) -> Tensor:
            with _Separate(rows):
                logits: Tensor = functional_call(self.base, {**weights, **state}, (own,))
                return logits

        logits: Tensor = vmap(one, randomness="error")(self._leaves, self.state, images)
        return logits

    def apply(self, function: Callable[[Network], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """`function` of each network, without gradients; each of its tensors as (K, ...).

        Args:
            function: Given the network; what else it reads is the same for all.
        """
        reader, rows = _Reader(self.base, function), _Rows(None, 0, None)

        def one(weights: dict[str, Tensor], state: dict[str, Tensor]) -> tuple[Tensor, ...]:
            own = {f"network.{name}": tensor for name, tensor in {**weights, **state}.items()}
            with _Separate(rows):
                found: tuple[Tensor, ...] = functional_call(reader, own, ())
                return found

        with torch.no_grad():
            applied: tuple[Tensor, ...] = vmap(one, randomness="error")(self._leaves, self.state)
        return applied

    def gradients(self, loss: Tensor) -> Tensor:
        """Gradient of a scalar on `weights`, (K, P).

        Raises:
            Unstackable: it does not depend on all of them: an optimiser would leave those alone.
        """
        parts = torch.autograd.grad(loss, list(self._leaves.values()), allow_unused=True)
        rows = []
        for name, part in zip(self._leaves, parts, strict=True):
            if part is None:
                raise Unstackable(f"{name} takes no part in the loss")
            rows.append(part.reshape(len(self), -1))
        return torch.cat(rows, dim=1)

    def clipped_sum(
        self,
        criterion: Callable[..., Tensor],
        bound: float,
        there: Tensor,
        images: Tensor,
        *targets: Tensor,
        draw: Draw | None = None,
    ) -> Tensor:
        """Sum of the images' gradients on `weights`, each clipped to a norm, (K, P).

        What is not finite in a gradient counts as zero.

        Args:
            criterion: (logits (1, C), *targets (1, ...)) -> one loss, (1,).
            bound: Euclidean norm to which the gradient of an image is clipped.
            there: Which images count, bool (K, B); the others only fill up.
            images: uint8 (K, B, channels, h, w).
            *targets: Each (K, B, ...).
            draw: What dropout draws, (K, B, 1, ...).
        """
        rows = _Rows(None, images.shape[1], draw, nested=True)

        def loss(weights: dict[str, Tensor], state: dict[str, Tensor], *sample: Tensor) -> Tensor:
            image, *target = (tensor[None] for tensor in sample)
            with _Separate(rows):
                logits = functional_call(self.base, {**weights, **state}, (image,))
            return criterion(logits, *target).sum()

        each = (0,) * (1 + len(targets))
        samples = vmap(grad(loss), in_dims=(None, None, *each), randomness="error")
        weights = {name: leaf.detach() for name, leaf in self._leaves.items()}
        found = vmap(samples, randomness="error")(weights, self.state, images, *targets)
        parts = [found[name].flatten(2).nan_to_num_(0.0, 0.0, 0.0) for name in self._leaves]
        norms = torch.stack([part.norm(dim=2) for part in parts]).norm(dim=0)
        # Opacus' small number: a gradient of zero stays one.
        factor = torch.where(there, (bound / (norms + 1e-6)).clamp(max=1.0), 0.0)
        return torch.cat([torch.einsum("kb,kbp->kp", factor, part) for part in parts], dim=1)

    def row(self, number: int) -> dict[str, Tensor]:
        """A copy of a network's weights and buffers, by name; what all share is left out."""
        mine = {**self._leaves, **self.state}
        return {
            name: tensor[number].detach().clone()
            for name, tensor in mine.items()
            if name not in self._fixed
        }

    def _cut(self) -> dict[str, Tensor]:
        """The weights of each layer, (K, ...), in the memory of `weights`."""
        parts = self.weights.split([shape.numel() for _, shape in self._places], dim=1)
        return {
            name: part.view(len(part), *shape).requires_grad_()
            for (name, shape), part in zip(self._places, parts, strict=True)
        }


@torch.no_grad()
def write_state(network: Network, state: Mapping[str, Tensor]) -> None:
    """Give a network the weights and buffers of a `Stack.row`."""
    own = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    torch._foreach_copy_([own[name] for name in state], list(state.values()))


def check_stack(stack: Stack, networks: Sequence[Network], images: Sequence[Tensor]) -> None:
    """Compare what a stack reads with what each network reads alone.

    A network that looks at its batch in a way that is not known here would see the rows that fill
    up; one that keeps numbers outside its weights would be read with another's.

    Args:
        stack: Of these networks; its running statistics stay as they are.
        networks: In any mode; left as they are.
        images: Of each network, at least one, uint8 (B, channels, h, w).

    Raises:
        Unstackable: they differ, or a stack cannot be read.
    """
    # Two images where there are two, then one more for every other network: rows are filled up.
    own = [part[: 2 + number % 2] for number, part in enumerate(images)]
    longest = max(map(len, own))
    counts = [len(part) for part in own]
    filled = torch.stack(
        [part[[n if n < len(part) else 0 for n in range(longest)]] for part in own]
    )
    device = stack.weights.device
    probe = copy.copy(stack)
    probe.state = {
        name: tensor if name in stack._fixed else tensor.clone()
        for name, tensor in stack.state.items()
    }
    training = stack.base.training
    with torch.no_grad():
        try:
            together = probe.read(filled.to(device), counts=torch.tensor(counts, device=device))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever vmap, or foreign code under it, refuses
            raise Unstackable(" ".join(str(error).split())[:200]) from error
        alone = []
        for network, part in zip(networks, own, strict=True):
            state = {name: t.detach().clone() for name, t in network.named_buffers()}
            modes = [(module, module.training) for module in network.modules()]
            network.train(training)
            try:
                with _Undropped():
                    alone.append(functional_call(network, state, (part.to(device),)))
            finally:
                for module, mode in modes:
                    module.training = mode
        if all(close(one[: len(other)], other) for one, other in zip(together, alone, strict=True)):
            return
    raise Unstackable(
        "a network reads something else alone: it looks at more than one image of a batch, or "
        "keeps numbers outside its weights"
    )


def close(one: Tensor, other: Tensor) -> bool:
    """Whether two readings of the same are as far apart as rounding takes them."""
    largest = other.float().abs().amax() if other.numel() else 0.0
    apart = (one.float() - other.float()).abs().nan_to_num(0.0)
    limit = _CLOSE.get(other.device.type, _CLOSE_ELSEWHERE) * (largest + 1e-6)
    return bool((apart <= limit).all())


class _Reader(nn.Module):
    """A function of a network, as a module whose weights are the network's."""

    def __init__(self, network: Network, function: Callable[[Network], Any]) -> None:
        super().__init__()
        self.network = network
        self._function = function

    def forward(self) -> Any:
        """What the function gives."""
        return self._function(self.network)


class _Rows:
    """What layers that look across a batch must know about it."""

    def __init__(
        self, counts: Tensor | None, length: int, draw: Draw | None, *, nested: bool = False
    ) -> None:
        self.nested = nested  # each image by itself: under a second vmap
        self.counts = counts
        self.there = (
            None if counts is None else torch.arange(length, device=counts.device) < counts[:, None]
        )
        self.draw = draw
        self.calls = 0
        self.lifted = False

    def lift(self) -> _Rows:
        """The same, one vmap further out."""
        lifted = copy.copy(self)
        lifted.lifted = True
        return lifted


class _Undropped(TorchFunctionMode):
    """Dropout drops nothing."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in (functional.dropout, functional.dropout2d):
            return args[0]
        return func(*args, **(kwargs or {}))


class _Separate(TorchFunctionMode):
    """Takes over the layers that vmap would get wrong."""

    def __init__(self, rows: _Rows) -> None:
        super().__init__()
        self._rows = rows

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.batch_norm:
            return self._batch_norm(*args, **kwargs)
        if func in (functional.dropout, functional.dropout2d):
            return self._dropout(*args, **kwargs, whole=func is functional.dropout2d)
        if func is functional.instance_norm and kwargs.get("running_mean") is not None:
            raise Unstackable("instance norm with running statistics")
        return func(*args, **kwargs)

    def _batch_norm(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        if not training:
            return functional.batch_norm(
                input, running_mean, running_var, weight, bias, False, momentum, eps
            )
        normed: Tensor = _BatchNorm.apply(
            input, running_mean, running_var, weight, bias, momentum, eps, self._rows
        )
        return normed

    def _dropout(
        self,
        input: Tensor,
        p: float = 0.5,
        training: bool = True,
        inplace: bool = False,
        *,
        whole: bool,
    ) -> Tensor:
        if not training or p == 0 or self._rows.draw is None:
            return input
        if p == 1:
            return input * 0
        kept = _Kept.apply(input.detach(), p, whole, self._rows.calls, self._rows)
        self._rows.calls += 1
        return input * kept.to(input.dtype).div(1 - p)


class _Physical(torch.autograd.Function):
    """An operation of the whole stack, (K, ...), which means nothing outside of it."""

    @staticmethod
    def forward(*_arguments: Any) -> Tensor:
        raise Unstackable("it is read inside another transform")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None: ...

    @staticmethod
    def backward(ctx: Any, *_gradients: Any) -> Any:
        raise AssertionError


class _Kept(_Physical):
    """What dropout keeps."""

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, input: Tensor, p: float, whole: bool, call: int, rows: _Rows
    ) -> tuple[Tensor, int]:
        x = input.movedim(in_dims[0], 0)
        if rows.nested and not rows.lifted:  # (B, 1, ...) of one network: on to all of them
            return _Kept.apply(x, p, whole, call, rows.lift()), 0
        shape = list(x.shape)
        if whole:
            channels = 3 if not rows.nested else 4
            shape[channels:] = [1] * (len(shape) - channels)
        assert rows.draw is not None
        return rows.draw(tuple(shape), p, call), 0


class _BatchNorm(_Physical):
    """Batch norm in training mode, each network by its own images."""

    @staticmethod
    def vmap(
        info: Any,
        in_dims: Any,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        momentum: float,
        eps: float,
        rows: _Rows,
    ) -> tuple[Tensor, int]:
        x = input.movedim(in_dims[0], 1)  # (B, K, channels, ...), as convolutions leave it
        if rows.counts is None:
            flat = functional.batch_norm(
                x.flatten(1, 2),
                None if running_mean is None else running_mean.view(-1),
                None if running_var is None else running_var.view(-1),
                None if weight is None else weight.reshape(-1),
                None if bias is None else bias.reshape(-1),
                True,
                momentum,
                eps,
            )
            return flat.unflatten(1, x.shape[1:3]), 1
        assert rows.there is not None
        full = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        over = (0, *range(3, x.ndim))
        places = x[0, 0, 0].numel()
        there = rows.there.t().reshape(*x.shape[:2], *[1] * (x.ndim - 2)).to(full.dtype)
        total = rows.counts.to(full.dtype)[:, None] * places
        mean = (full * there).sum(over) / total
        centred = full - _beside(mean, x)
        variance = (centred.square() * there).sum(over) / total
        scale = (variance + eps).rsqrt()
        if weight is not None:
            scale = scale * weight
        normed = centred * _beside(scale, x)
        if bias is not None:
            normed = normed + _beside(bias, x)
        if running_mean is not None and running_var is not None:
            with torch.no_grad():
                unbiased = variance * (total / (total - 1))
                running_mean.mul_(1 - momentum).add_(momentum * mean)
                running_var.mul_(1 - momentum).add_(momentum * unbiased)
        return normed.to(x.dtype), 1


def _beside(values: Tensor, x: Tensor) -> Tensor:
    """(K, channels) -> what goes with (B, K, channels, ...)."""
    return values.reshape(1, *values.shape, *[1] * (x.ndim - 3))
