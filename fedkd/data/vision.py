"""The one door to torchvision.

torchvision's wheel from the registry is built against CUDA torch. Beside a CPU-only torch its
compiled operators do not load, and `import torchvision` itself fails with "operator
torchvision::nms does not exist". Declaring those operators first makes the import succeed:
models, transforms and data sets then work, while the compiled ones (`ops.nms`, `io.*`) raise
torchvision's own error when called. Import torchvision from here, nowhere else.
"""

from __future__ import annotations

import importlib.util
import warnings

import torch

# Kept alive for the life of the process: dropping the library un-declares the operators.
_stub: torch.library.Library | None = None

if torch.version.cuda is None and importlib.util.find_spec("torchvision") is not None:
    _stub = torch.library.Library("torchvision", "FRAGMENT")
    for _name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, _name):
            _stub.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torchvision
        from torchvision import datasets, models
        from torchvision.transforms import v2 as transforms
except (ImportError, RuntimeError) as error:
    raise ImportError(
        f"torchvision does not import beside torch {torch.__version__}: {error}. "
        "Install the torchvision release that belongs to this torch "
        "(0.26 with 2.11, 0.27 with 2.12, 0.28 with 2.13)."
    ) from error


def compiled_operators() -> bool:
    """Whether torchvision's compiled operators (`ops.nms`, `io.decode_image`) work here."""
    from torchvision.extension import _has_ops

    return bool(_has_ops())


__all__ = ["compiled_operators", "datasets", "models", "torchvision", "transforms"]
