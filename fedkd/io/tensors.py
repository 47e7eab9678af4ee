"""Tensors in files: what torch or safetensors wrote, read without running code."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedkd.io.extras import extra

State = dict[str, Any]
"""What a training goes on from: tensors and plain values by name."""


def load_state(path: Path) -> State:
    """Load what `save_state` wrote, if it is what was written; never unpickles code.

    A file that ends in `.safetensors` is read by that library.

    Raises:
        RuntimeError: the file cannot be read; one line.
    """
    try:
        if path.suffix == ".safetensors":
            with extra("foundation", f"reading {path.name}"):
                from safetensors.torch import load_file
            return dict(load_file(path))
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:  # torch does not look at the checksums in it
                if (part := archive.testzip()) is not None:
                    raise ValueError(f"the checksum of its part {part} is wrong")
        state: State = torch.load(path, map_location="cpu", weights_only=True)
    except ModuleNotFoundError:
        raise
    except Exception as error:  # torch reports a damaged file in half a dozen exception types
        reason = " ".join(str(error).split()).split(". ")[0][:300]  # the rest is advice to trust it
        raise RuntimeError(f"cannot read {path}: {type(error).__name__}: {reason}") from error
    return state


def save_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> None:
    """Write tensors as safetensors, with plain text about them."""
    with extra("hf", f"writing {path.name}"):
        from safetensors.torch import save_file

    whole = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    save_file(whole, path, dict(about))


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits; a file that has not changed is read once."""
    facts = path.stat()
    return _file_hash(path, facts.st_mtime_ns, facts.st_size)


@lru_cache(maxsize=32)
def _file_hash(path: Path, _changed: int, _size: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
