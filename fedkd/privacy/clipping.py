"""Steps of DP-SGD: each example's gradient clipped, summed and noised, with Opacus' hooks.

`ClippedSteps` drives Opacus' optimisers on batches that the caller has drawn. Opacus'
`PrivacyEngine` is not used: it takes the sampling rate and the divisor of the gradient from the
number of private examples, which would publish that number.

References:
    Abadi et al., "Deep Learning with Differential Privacy", CCS 2016,
    https://arxiv.org/abs/1607.00133
    Li et al., "Large Language Models Can Be Strong Differentially Private Learners" (ghost
    clipping), ICLR 2022, https://arxiv.org/abs/2110.05679
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache
from types import SimpleNamespace, TracebackType
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from fedkd.io.extras import extra
from fedkd.privacy.noise import SecureGenerator
from fedkd.training.loop import check_time

Clipping = Literal["hooks", "ghost"]
"""`hooks` keeps every example's gradient; `ghost` only their norms, and goes backward twice."""

Criterion = Callable[..., Tensor]
"""(logits (B, C), *targets (B, ...)) -> one loss per example, (B,)."""

Part = tuple[Tensor, ...]
"""A physical batch: images (B, channels, h, w) and the targets that the criterion takes."""


class ClippedSteps:
    """Noisy steps on the sum of clipped gradients. A context manager: it takes its hooks along.

    An example whose gradient is not finite counts as one without gradient: it must not spoil the
    sum, or a single example would decide over the whole network.

    Args:
        network: Trained in place; put into training mode.
        criterion: What is minimised on every example alone.
        optimizer: Over the network's parameters.
        noise_multiplier: Standard deviation of the noise in units of `max_grad_norm`.
        max_grad_norm: Euclidean norm to which each example's gradient is clipped.
        expected_batch_size: What the noisy sum is divided by; a public number, never the count of
            examples drawn.
        clipping: How gradients are clipped; both give the same steps.
        noise: Where the noise comes from; the operating system if None.
    """

    def __init__(
        self,
        network: nn.Module,
        criterion: Criterion,
        optimizer: torch.optim.Optimizer,
        *,
        noise_multiplier: float,
        max_grad_norm: float,
        expected_batch_size: float,
        clipping: Clipping = "hooks",
        noise: SecureGenerator | None = None,
    ) -> None:
        opacus = _opacus()
        self._network = network.train()
        self._criterion = criterion
        self._ghost = clipping == "ghost"
        self._ghost_loss = opacus.DPTensorFastGradientClipping
        # The losses are summed, so nobody needs to know how many there are. Opacus' optimiser alone
        # gets "mean": there it means the division by the expected size.
        if self._ghost:
            make_module, make_optimizer = (
                opacus.GradSampleModuleFastGradientClipping,
                opacus.DPOptimizerFastGradientClipping,
            )
            more = {"max_grad_norm": max_grad_norm}
        else:
            make_module, make_optimizer = opacus.GradSampleModule, opacus.DPOptimizer
            more = {}
        self._module: Any = make_module(network, loss_reduction="sum", **more)
        self._module.forbid_grad_accumulation()
        # Opacus draws its noise from torch's generators (see fedkd.privacy.noise). It is left
        # out, and ours added to the gradient that it is about to hand over.
        self._optimizer: Any = make_optimizer(
            optimizer,
            noise_multiplier=0.0,
            max_grad_norm=max_grad_norm,
            expected_batch_size=expected_batch_size,
            loss_reduction="mean",
        )
        self._noise = SecureGenerator() if noise is None else noise
        self._deviation = noise_multiplier * max_grad_norm / expected_batch_size
        if self._deviation > 0:
            self._optimizer.attach_step_hook(self._add_noise)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._module.to_standard_module()
        for module in self._network.modules():
            for left in ("activations", "max_batch_len"):  # of a pass that did not end
                module.__dict__.pop(left, None)
        for parameter in self._network.parameters():
            parameter.__dict__.pop("summed_grad", None)
            parameter.grad = None

    def step(self, parts: Sequence[Part]) -> None:
        """One step on all examples of `parts` together; without any it moves by noise alone.

        Args:
            parts: One drawn batch in pieces that fit into memory. Noise is added once.

        Raises:
            ValueError: the criterion does not give one loss per example.
        """
        check_time()
        for number, (images, *targets) in enumerate(parts, start=1):
            self._optimizer.signal_skip_step(number < len(parts))
            self._optimizer.zero_grad(set_to_none=True)
            self._backward(images, targets)
            self._optimizer.step()
        if not parts:
            self._optimizer.zero_grad(set_to_none=True)
            self._no_gradients()
            self._optimizer.step()

    def per_example(self, images: Tensor, *targets: Tensor) -> dict[str, Tensor]:
        """Every trainable parameter's gradients before clipping, name -> (B, ...); hooks only."""
        self._optimizer.zero_grad(set_to_none=True)
        self._backward(images, targets)
        return {
            name: p.__dict__["grad_sample"]
            for name, p in self._network.named_parameters()
            if p.requires_grad
        }

    def _backward(self, images: Tensor, targets: Sequence[Tensor]) -> None:
        """Leave behind what the optimiser sums: gradients per example, or their clipped sum."""
        # Opacus reads the inputs of convolutions as if they were contiguous.
        losses = self._criterion(self._module(images.contiguous()), *targets)
        if losses.shape != (len(images),):
            raise ValueError(
                f"a private loss is one value per example: expected {(len(images),)}, got "
                f"{tuple(losses.shape)}"
            )
        if not self._ghost:
            losses.sum().backward()
            for parameter in self._optimizer.params:
                if parameter.grad_sample is not None:
                    parameter.grad_sample.nan_to_num_(0.0, 0.0, 0.0)
            return
        self._ghost_loss(self._module, self._optimizer, losses, "sum").backward()
        if all(parameter.grad.isfinite().all() for parameter in self._optimizer.params):
            return
        kept = self._module.per_sample_gradient_norms.isfinite()
        self._optimizer.zero_grad(set_to_none=True)
        if kept.any():
            self._backward(images[kept], [target[kept] for target in targets])
        else:
            self._no_gradients()

    def _add_noise(self, _optimizer: object) -> None:
        for parameter in self._optimizer.params:
            noise = self._noise.normal(tuple(parameter.shape), self._deviation)
            parameter.grad += noise.to(parameter.grad)

    def _no_gradients(self) -> None:
        for parameter in self._optimizer.params:
            if self._ghost:
                parameter.grad = torch.zeros_like(parameter)
            else:
                parameter.grad_sample = parameter.new_zeros((0, *parameter.shape))


@lru_cache(maxsize=1)
def _opacus() -> SimpleNamespace:
    """What is used of Opacus, imported on first use: that takes seconds."""
    root = logging.getLogger()
    handlers = list(root.handlers)
    try:
        with extra("privacy", "DP-SGD"):
            from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
            from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
            from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping
    finally:
        # Importing Opacus sets up the program's logging, which is not a library's business.
        root.handlers[:] = handlers
    # Images need no gradient; that is what torch remarks on, at every first layer.
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    return SimpleNamespace(
        GradSampleModule=GradSampleModule,
        GradSampleModuleFastGradientClipping=GradSampleModuleFastGradientClipping,
        DPOptimizer=DPOptimizer,
        DPOptimizerFastGradientClipping=DPOptimizerFastGradientClipping,
        DPTensorFastGradientClipping=DPTensorFastGradientClipping,
    )
