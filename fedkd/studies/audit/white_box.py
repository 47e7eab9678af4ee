"""Who sees every noisy step: how strongly was each canary in them?

An adversary of DP-SGD may have all weights of all steps, and know every image but which canaries
were among them. So each canary's clipped gradient is held against the noisy gradient of every step,
less what the client's own images are expected to add to it. Black-box scores see only what the
teacher makes of a canary at the end.

References:
    Steinke, Nasr and Jagielski, "Privacy Auditing with One (1) Training Run", NeurIPS 2023,
    Algorithm 2, https://arxiv.org/abs/2305.08846
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn import functional

from fedkd.data.images import ImageSet
from fedkd.models.network import Network
from fedkd.privacy.dp_sgd import Mechanism

MOST_OTHERS = 500
"""How many of the client's own images are looked at in a step; they stand for all."""

# Numbers in the gradients of images that are read at once.
_CHUNK = 20_000_000


class Observer:
    """Collects scores of canaries while a teacher is trained.

    Args:
        teacher: Before its training.
        canaries: Labelled images, each of which may be trained on.
        shard: The other images that are.
        mechanism: How.
        label_smoothing: Of the loss.
    """

    def __init__(
        self,
        teacher: Network,
        canaries: ImageSet,
        shard: ImageSet,
        mechanism: Mechanism,
        label_smoothing: float,
    ) -> None:
        self._teacher, self._copy = teacher, copy.deepcopy(teacher).eval()
        self._canaries, self._mechanism = canaries, mechanism
        self._smoothing = label_smoothing
        self._others = shard.subset(torch.arange(min(len(shard), MOST_OTHERS)))
        self._share = len(shard) / max(len(self._others), 1)
        self._names = [name for name, p in teacher.named_parameters() if p.requires_grad]
        self._chunk = max(1, _CHUNK // sum(teacher.get_parameter(n).numel() for n in self._names))
        self._scores = torch.zeros(len(canaries), dtype=torch.float64)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around one step of the training."""
        weights = {n: self._teacher.get_parameter(n).detach().clone() for n in self._names}
        yield
        with torch.no_grad():
            own = (self._teacher.get_parameter(name) for name in self._names)
            noisy = torch.cat([(p.new_zeros(p.shape) if p.grad is None else p.grad).flatten()
                               for p in own])  # fmt: skip
        size, rate = self._mechanism.expected_batch_size, self._mechanism.sample_rate
        expected = torch.zeros_like(noisy)
        for _, clipped in self._clipped(weights, self._others):
            expected += rate * self._share * clipped.sum(0)
        left = noisy * size - expected
        for rows, clipped in self._clipped(weights, self._canaries):
            self._scores[rows] += (clipped @ left).double().cpu()

    @property
    def scores(self) -> np.ndarray:
        """Higher for canaries that seem to have taken part, (m,)."""
        return self._scores.numpy()

    def _clipped(
        self, weights: dict[str, Tensor], images: ImageSet
    ) -> Iterator[tuple[slice, Tensor]]:
        """Some images after the other, and the gradient of each, (B, P)."""
        assert images.labels is not None
        smoothing, device = self._smoothing, self._teacher.mean.device

        def loss(own: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
            logits = functional_call(self._copy, own, (image[None],))
            return functional.cross_entropy(logits, label[None], label_smoothing=smoothing)

        each = vmap(grad(loss), in_dims=(None, 0, 0))
        for start in range(0, len(images), self._chunk):
            rows = slice(start, start + self._chunk)
            found = each(weights, images.images[rows].to(device), images.labels[rows].to(device))
            flat = torch.cat([found[name].flatten(1) for name in self._names], dim=1)
            flat.nan_to_num_(0.0, 0.0, 0.0)
            norms = flat.norm(dim=1, keepdim=True)
            yield rows, flat * (self._mechanism.max_grad_norm / (norms + 1e-6)).clamp(max=1.0)
