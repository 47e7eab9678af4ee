"""Optimiser and learning-rate schedule, for teachers and students alike."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fedkd.models.arguments import one_of, real, truth
from fedkd.models.network import shown

# Learning rate and weight decay where none is given.
RATES = {"sgd": (0.05, 5e-4), "adam": (0.003, 0.0), "adamw": (0.003, 0.01)}
SCHEDULES = ("constant", "cosine", "step")


@dataclass(frozen=True)
class Optimizer:
    """How a network is trained: the optimiser and its learning-rate schedule.

    Attributes:
        name: The optimiser.
        lr: Learning rate; None takes the one that goes with the name.
        momentum: For SGD only.
        weight_decay: Likewise; None takes the one that goes with the name.
        nesterov: For SGD with momentum only.
        schedule: How the learning rate changes, step by step.
        milestones: For `step`: shares of the training after which it drops.
        gamma: For `step`: factor of each drop.
        warmup: Share of the steps in which it rises linearly.
        max_grad_norm: Euclidean norm to which the gradient of a batch is clipped.

    Raises:
        ValueError: one of these is none; the message begins with its name.
    """

    name: Literal["sgd", "adam", "adamw"] = "adamw"
    lr: float | None = None
    momentum: float = 0.9
    weight_decay: float | None = None
    nesterov: bool = False
    schedule: Literal["constant", "cosine", "step"] = "cosine"
    milestones: tuple[float, ...] = (0.625, 0.75, 0.875)
    gamma: float = 0.1
    warmup: float = 0.0
    max_grad_norm: float | None = None

    def __post_init__(self) -> None:
        one_of("name", self.name, list(RATES))
        one_of("schedule", self.schedule, SCHEDULES)
        truth("nesterov", self.nesterov)
        for key in ("lr", "gamma", "max_grad_norm"):
            if (value := getattr(self, key)) is not None and real(key, value, 0) == 0:
                raise ValueError(f"{key}: expected a number above 0, got {value!r}")
        if self.weight_decay is not None:
            real("weight_decay", self.weight_decay, 0)
        shares = {"momentum": self.momentum, "gamma": self.gamma, "warmup": self.warmup}
        shares |= {f"milestones[{n}]": share for n, share in enumerate(self.milestones)}
        for key, share in shares.items():
            if real(key, share, 0) > 1:
                raise ValueError(f"{key}: expected at most 1, got {share!r}")
        if self.nesterov and (self.name != "sgd" or self.momentum == 0):
            raise ValueError(
                f"nesterov: needs name sgd and a momentum above 0, got {self.name} and "
                f"{self.momentum:g}; set nesterov=False"
            )

    @property
    def rates(self) -> tuple[float, float]:
        """Learning rate and weight decay."""
        lr, weight_decay = RATES[self.name]
        return (
            lr if self.lr is None else self.lr,
            weight_decay if self.weight_decay is None else self.weight_decay,
        )


DEFAULT_OPTIMIZER = Optimizer()


def an_optimizer(name: str, value: object) -> Optimizer:
    """An `Optimizer`, by default ours. Raises `ValueError`."""
    if value is None:
        return DEFAULT_OPTIMIZER
    if not isinstance(value, Optimizer):
        raise ValueError(
            f"{name}: expected a fedkd.Optimizer, e.g. fedkd.Optimizer(lr=0.01), got {shown(value)}"
        )
    return value


def make_optimizer(
    parameters: Iterable[nn.Parameter],
    options: Optimizer,
    total_steps: int,
    *,
    on_device: bool = False,
) -> tuple[torch.optim.Optimizer, Schedule]:
    """Optimiser over `parameters` and a schedule that is stepped once per batch.

    Args:
        parameters: What is trained.
        options: How.
        total_steps: Of the whole training.
        on_device: Whether the step is one operation that fetches nothing, and the learning rate a
            tensor beside the weights, which a captured step reads anew: for accelerators.
    """
    parameters = list(parameters)
    lr, weight_decay = options.rates
    on_cpu = not on_device and all(weight.device.type == "cpu" for weight in parameters)
    more: dict[str, Any] = {"fused": True} if on_device else {}
    optimizer: torch.optim.Optimizer
    if options.name == "sgd":
        optimizer = torch.optim.SGD(
            parameters,
            lr=lr,
            momentum=options.momentum,
            weight_decay=weight_decay,
            nesterov=options.nesterov,
            foreach=True if on_cpu else None,
            **more,
        )
    elif on_cpu:
        cpu_kind = _CpuAdam if options.name == "adam" else _CpuAdamW
        optimizer = cpu_kind(parameters, lr=lr, weight_decay=weight_decay)
    else:
        kind = torch.optim.Adam if options.name == "adam" else torch.optim.AdamW
        if on_device:
            more["capturable"] = True
        optimizer = kind(parameters, lr=lr, weight_decay=weight_decay, **more)
    if on_device:
        for group in optimizer.param_groups:
            device = group["params"][0].device
            group["lr"] = torch.tensor(group["lr"], dtype=torch.float32, device=device)
        begin_moments(optimizer)
    return optimizer, Schedule(optimizer, options, total_steps)


class Schedule:
    """The learning rate, step by step, written where the optimiser reads it.

    Args:
        optimizer: Whose learning rate.
        options: How it changes.
        total_steps: Of the whole training.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, options: Optimizer, total_steps: int
    ) -> None:
        self._optimizer = optimizer
        self._options = options
        self._total = total_steps
        self._step = 0
        self._write()

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        return learning_rate(self._options, self._step, self._total)

    def step(self) -> None:
        """Go on by one step."""
        self._step += 1
        self._write()

    def seek(self, step: int) -> None:
        """Go to a step: not every epoch has as many."""
        self._step = step
        self._write()

    def state_dict(self) -> dict[str, int]:
        """Where it stands."""
        return {"last_epoch": self._step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there; what the optimiser reads is the optimiser's own state."""
        self._step = state["last_epoch"]

    def _write(self) -> None:
        lr = self.lr
        for group in self._optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr


class _CpuAdam(torch.optim.Adam):
    """Adam on a CPU: the same operations, each of them for all weights in one call.

    So the bits are the same, without the way through Python for each weight. torch's own
    `foreach` fetches the number of steps weight by weight, twice.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Move the weights that have a gradient."""
        (group,) = self.param_groups
        weights = [weight for weight in group["params"] if weight.grad is not None]
        states = [self.state.get(weight) for weight in weights]
        taken = {float(state["step"]) if state else 0.0 for state in states}
        if closure is not None or len(taken) != 1 or 0.0 in taken:
            # The first step, or weights that began at another one than others.
            return super().step(closure)
        gradients = [weight.grad for weight in weights]
        steps, means, squares = (
            [state[name] for state in states if state] for name in ("step", "exp_avg", "exp_avg_sq")
        )
        step, lr, decay = taken.pop() + 1, group["lr"], group["weight_decay"]
        first, second = group["betas"]
        torch._foreach_add_(steps, 1)
        if decay and isinstance(self, torch.optim.AdamW):
            torch._foreach_mul_(weights, 1 - lr * decay)
        elif decay:
            gradients = list(torch._foreach_add(gradients, weights, alpha=decay))
        torch._foreach_lerp_(means, gradients, 1 - first)
        torch._foreach_mul_(squares, second)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - second)
        spreads = torch._foreach_sqrt(squares)
        torch._foreach_div_(spreads, (1 - second**step) ** 0.5)
        torch._foreach_add_(spreads, group["eps"])
        torch._foreach_addcdiv_(weights, means, spreads, -(lr / (1 - first**step)))
        return None


class _CpuAdamW(_CpuAdam, torch.optim.AdamW):
    """AdamW on a CPU, likewise."""


def begin_moments(optimizer: torch.optim.Optimizer) -> None:
    """Give a fused SGD the momentum that it lacks: zeros, which change no first step.

    It takes all of them or none, and a weight may see its first gradient later than others.
    """
    for group in optimizer.param_groups:
        if isinstance(optimizer, torch.optim.SGD) and group["fused"] and group["momentum"]:
            for weight in group["params"]:
                if optimizer.state[weight].get("momentum_buffer") is None:
                    optimizer.state[weight]["momentum_buffer"] = torch.zeros_like(weight)


def learning_rate(options: Optimizer, step: int, total_steps: int) -> float:
    """The learning rate at `step`, from 0, of a training of so many steps."""
    return options.rates[0] * _factor(options, step, total_steps)


class RowOptimizer:
    """What `make_optimizer` makes, for many networks at once: a row of weights each.

    Every optimiser here works on each weight alone, so rows differ in nothing but their learning
    rate. All is done by tensors in their place, so that a step can be captured as a graph.

    Args:
        options: Optimiser; the schedule is the caller's.
        weights: (K, P), changed in place.
    """

    # torch.optim's defaults.
    _BETAS = (0.9, 0.999)
    _EPS = 1e-8

    def __init__(self, options: Optimizer, weights: Tensor) -> None:
        self._options = options
        self._weights = weights
        wanted = {"sgd": 1 if options.momentum else 0}.get(options.name, 2)
        self._moments = [torch.zeros_like(weights) for _ in range(wanted)]

    def take(self, rows: Tensor, weights: Tensor) -> RowOptimizer:
        """The optimiser of some of the rows, whose weights now lie elsewhere."""
        taken = RowOptimizer(self._options, weights)
        taken._moments = [moment[rows] for moment in self._moments]
        return taken

    @classmethod
    def corrections(cls, step: int) -> tuple[float, float]:
        """By what Adam divides its moments at `step`, from 0: the second one is a root."""
        first, second = cls._BETAS
        return 1 - first ** (step + 1), math.sqrt(1 - second ** (step + 1))

    @torch.no_grad()
    def step(self, gradients: Tensor, lr: Tensor, corrections: tuple[Tensor, Tensor]) -> None:
        """Move the weights.

        Args:
            gradients: (K, P); changed.
            lr: Learning rate of each row, (K, 1).
            corrections: Of Adam, each (K, 1) or a scalar.
        """
        options, weights = self._options, self._weights
        decay = options.rates[1]
        if options.name == "adamw":
            weights.mul_(1 - lr * decay)
        elif decay:
            gradients = gradients.add_(weights, alpha=decay)
        if options.name == "sgd":
            move = gradients
            for moment in self._moments:
                moment.mul_(options.momentum).add_(gradients)
                move = gradients.add(moment, alpha=options.momentum) if options.nesterov else moment
            weights.addcmul_(move, lr, value=-1)
            return
        mean, square = self._moments
        first, second = self._BETAS
        mean.lerp_(gradients, 1 - first)
        square.mul_(second).addcmul_(gradients, gradients, value=1 - second)
        spread = square.sqrt().div_(corrections[1]).add_(self._EPS)
        weights.sub_(mean.div(spread).mul_(lr / corrections[0]))


def _factor(options: Optimizer, step: int, total: int) -> float:
    """Learning rate at `step` (from 0) as a share of the first one."""
    progress = min(step / max(total, 1), 1.0)
    if progress < options.warmup:
        return (step + 1) / (options.warmup * total + 1)
    if options.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    if options.schedule == "step":
        return options.gamma ** bisect.bisect_right(options.milestones, progress)
    return 1.0
