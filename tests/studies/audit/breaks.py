"""Ways to break private training that its audits have to see, each where the work is done.

Every break is one of both paths, of a client trained alone and of clients trained together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import count
from typing import Any
from unittest import mock

import torch
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from torch import Tensor

from fedkd.models.stacked import Stack
from fedkd.privacy import clipping, dp_sgd
from fedkd.privacy.clipping import ClippedSteps
from fedkd.privacy.noise import SecureGenerator

Break = Callable[[ExitStack], None]


@contextmanager
def broken(name: str) -> Iterator[None]:
    """Train privately with the break of this name; `none` for none."""
    with ExitStack() as stack:
        BREAKS[name](stack)
        yield


def _nothing(stack: ExitStack) -> None:
    del stack


def _no_clipping(stack: ExitStack) -> None:
    made, stacked = DPOptimizer.__init__, Stack.clipped_sum

    def unclipped(self: Any, *args: Any, max_grad_norm: float, **more: Any) -> None:
        made(self, *args, max_grad_norm=1e12, **more)

    def sums(self: Stack, criterion: Any, _bound: float, *rest: Any, **more: Any) -> Tensor:
        return stacked(self, criterion, 1e12, *rest, **more)

    patch(stack, DPOptimizer, "__init__", unclipped)
    patch(stack, Stack, "clipped_sum", sums)
    patch(
        stack, _ghost(), "get_clipping_coef", lambda self: torch.ones_like(self.get_norm_sample())
    )


def _quarter(stack: ExitStack) -> None:
    normal = SecureGenerator.normal

    def small(self: SecureGenerator, shape: tuple[int, ...], deviation: float) -> Tensor:
        return normal(self, shape, deviation / 4)

    patch(stack, SecureGenerator, "normal", small)


def _every_second(stack: ExitStack) -> None:
    added, noise = ClippedSteps._add_noise, dp_sgd._noise

    def later(self: object) -> bool:
        return next(self.__dict__.setdefault("taken", count())) % 2 == 1

    def add(self: ClippedSteps, optimizer: object) -> None:
        if later(self):
            added(self, optimizer)

    def of_row(generator: SecureGenerator, network: Stack, deviation: float) -> Tensor:
        return noise(generator, network, deviation * later(generator))

    patch(stack, ClippedSteps, "_add_noise", add)
    patch(stack, dp_sgd, "_noise", of_row)


def _mean_of_batch(stack: ExitStack) -> None:
    """The mean of a batch's gradients is clipped, and counts for each of its images."""
    stacked, gathered = Stack.clipped_sum, DPOptimizerFastGradientClipping.accumulate
    last = {"images": 1}

    def shrunk(means: list[Tensor], bound: float) -> list[Tensor]:
        norm = torch.stack([mean.norm() for mean in means]).norm()
        return [mean * (bound / (norm + 1e-6)).clamp(max=1.0) for mean in means]

    def hooks(self: Any) -> None:
        samples = [parameter.grad_sample for parameter in self.params]
        images = max(len(samples[0]), 1)
        means = shrunk([sample.sum(0) / images for sample in samples], self.max_grad_norm)
        for parameter, mean in zip(self.params, means, strict=True):
            before = parameter.summed_grad
            parameter.summed_grad = mean * images + (0 if before is None else before)

    def every(self: Any) -> Tensor:
        norms = self.get_norm_sample()
        last["images"] = len(norms)
        return torch.ones_like(norms)

    def ghost(self: Any) -> None:
        means = shrunk([p.grad / last["images"] for p in self.params], self.max_grad_norm)
        for parameter, mean in zip(self.params, means, strict=True):
            parameter.grad = mean * last["images"]
        gathered(self)

    def together(
        self: Stack, criterion: Any, bound: float, there: Tensor, *rest: Any, **more: Any
    ) -> Tensor:
        images = there.sum(1, keepdim=True).clamp(min=1)
        mean = stacked(self, criterion, 1e12, there, *rest, **more) / images
        return mean * (bound / (mean.norm(dim=1, keepdim=True) + 1e-6)).clamp(max=1.0) * images

    patch(stack, DPOptimizer, "clip_and_accumulate", hooks)
    patch(stack, DPOptimizerFastGradientClipping, "accumulate", ghost)
    patch(stack, _ghost(), "get_clipping_coef", every)
    patch(stack, Stack, "clipped_sum", together)


def _known_key(stack: ExitStack) -> None:
    """The noise is as large as promised, and the same in every training."""
    made = SecureGenerator.__init__

    def known(self: SecureGenerator, _seed: int | None = None) -> None:
        made(self, 1)

    patch(stack, SecureGenerator, "__init__", known)


def _ghost() -> Any:
    return clipping._opacus().GradSampleModuleFastGradientClipping


def patch(stack: ExitStack, where: object, name: str, by: object) -> None:
    stack.enter_context(mock.patch.object(where, name, by))


BREAKS: dict[str, Break] = {
    "none": _nothing,
    "no clipping": _no_clipping,
    "noise / 4": _quarter,
    "noise every second step": _every_second,
    "the batch's mean clipped": _mean_of_batch,
    "noise of a known key": _known_key,
}
