"""How an accelerator computes: TF32, autotuned or deterministic operations."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch


@contextmanager
def numerics(device: torch.device, precision: str, *, autotune: bool = False) -> Iterator[None]:
    """Compute a block on a CUDA device in a precision; elsewhere nothing is changed.

    `tf32` also multiplies matrices in TF32; `float32` leaves that to torch, which computes
    convolutions in TF32 and matrix products in float32.

    Args:
        device: Where.
        precision: A name of `fedkd.distillation.trainer.DTYPES`.
        autotune: Try convolutions in several ways and keep the fastest, unless `deterministic` is
            asked for. Costs seconds at the start, and gave one network nothing.
    """
    if device.type != "cuda":
        yield
        return
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.benchmark
    cudnn.benchmark = autotune and not torch.are_deterministic_algorithms_enabled()
    coarse = matmul.allow_tf32, cudnn.allow_tf32
    if precision == "tf32":
        matmul.allow_tf32 = cudnn.allow_tf32 = True
    try:
        yield
    finally:
        cudnn.benchmark = before
        if precision == "tf32":
            matmul.allow_tf32, cudnn.allow_tf32 = coarse


@contextmanager
def deterministic(on: bool) -> Iterator[None]:
    """Compute a block by operations that give the same bits for the same input, if `on`.

    An operation of which torch has no such version raises `RuntimeError`.
    """
    if not on:
        yield
        return
    # Read once by cuBLAS, when it is first used.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    cudnn, fill = torch.backends.cudnn, cast(Any, torch.utils.deterministic)
    before = (
        torch.are_deterministic_algorithms_enabled(),
        cudnn.deterministic,
        cudnn.benchmark,
        fill.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True)
    cudnn.deterministic, cudnn.benchmark = True, False
    fill.fill_uninitialized_memory = False  # costs a pass over memory that is written anyway
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        cudnn.deterministic, cudnn.benchmark, fill.fill_uninitialized_memory = before[1:]
