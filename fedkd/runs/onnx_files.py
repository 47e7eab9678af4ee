"""ONNX files of students: written, quantised, timed and read."""

from __future__ import annotations

import logging
import statistics
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedkd.io.extras import extra
from fedkd.runs.signature import SIGNATURE

BATCHES = (1, 32)
"""Batch sizes at which a file is timed."""
_REPEATS, _WARMUP = 20, 3
_AT_ONCE = 50  # images whose ranges are looked at together
_PRODUCTS = ["Conv", "Gemm", "MatMul"]


def write_onnx(student: nn.Module, images: Tensor, path: Path, about: str) -> Tensor:
    """Write a student; what the written file says of the images."""
    with extra("onnx", "--format onnx"):
        import onnxscript  # noqa: F401  (torch.onnx needs it)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's, of itself
        program = torch.onnx.export(
            student,
            (images[:2],),
            dynamo=True,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            verbose=False,
        )
    assert program is not None  # as always with dynamo
    program.model.metadata_props[SIGNATURE] = about
    program.save(str(path), external_data=False)
    return OnnxStudent(path)(images)


def write_int8(file: Path, output: Path, images: Tensor) -> None:
    """Quantise a written student to 8 bits: weights per channel, activations by ranges.

    Only products are: between the layers of a transformer, rounding costs more than it saves.

    Args:
        file: What `write_onnx` wrote.
        output: File to write.
        images: In whose reading the ranges of activations are looked at.
    """
    with extra("onnx", "--quantise int8"):
        from onnxruntime.quantization.calibrate import CalibrationDataReader
        from onnxruntime.quantization.quant_utils import QuantFormat, QuantType
        from onnxruntime.quantization.quantize import quantize_static

    class Ranges(CalibrationDataReader):
        def __init__(self) -> None:
            self._batches = iter(images.split(_AT_ONCE))

        def get_next(self) -> dict[str, Any] | None:  # type: ignore[override]
            batch = next(self._batches, None)
            return None if batch is None else {"images": batch.numpy()}

    with _quiet():
        quantize_static(
            str(file),
            str(output),
            Ranges(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=_PRODUCTS if _is_transformer(file) else None,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )


def _is_transformer(file: Path) -> bool:
    import onnx

    return any(node.op_type == "Softmax" for node in onnx.load(str(file)).graph.node)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without advice on how a file could be prepared."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


class OnnxStudent(nn.Module):
    """A written student at work, on the CPU.

    Args:
        path: The file.
        threads: For its sums; 0: as many as there are processors.

    Raises:
        ValueError: it is no file that ONNX Runtime reads.
    """

    def __init__(self, path: Path, threads: int = 0) -> None:
        super().__init__()
        with extra("onnx", path.name):
            import onnxruntime
        options = onnxruntime.SessionOptions()  # type: ignore[attr-defined]
        options.intra_op_num_threads = options.inter_op_num_threads = threads
        try:
            self._session = onnxruntime.InferenceSession(  # type: ignore[attr-defined]
                str(path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # its own types, which are not public
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"{path}: not an ONNX file that can be used ({reason})") from None

    @property
    def about(self) -> str | None:
        """What was written of the student into the file."""
        text: str | None = self._session.get_modelmeta().custom_metadata_map.get(SIGNATURE)
        return text

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, C) of uint8 images (B, channels, h, w)."""
        return torch.from_numpy(self._session.run(["logits"], {"images": images.numpy()})[0])


def milliseconds(path: Path, images: Tensor) -> dict[int, float]:
    """Batch size -> milliseconds that a file takes for an image, median, with one thread."""
    student, found = OnnxStudent(path, threads=1), {}
    for size in BATCHES:
        batch = images[torch.arange(size) % len(images)]
        spent = []
        for _ in range(_WARMUP + _REPEATS):
            begin = time.perf_counter()
            student(batch)
            spent.append(time.perf_counter() - begin)
        found[size] = 1e3 * statistics.median(spent[_WARMUP:]) / size
    return found
