"""The student as one file, and the student at work on a picture."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn

from fedkd.build import build_data, build_network
from fedkd.config import ConfigError
from fedkd.data.splits import FederatedData
from fedkd.models.network import Network
from fedkd.rundir import RunDirectory

FORMATS = {"torch": "student.pt2", "onnx": "student.onnx"}


@dataclass(frozen=True)
class Exported:
    """An exported student and how it compares to the original.

    Attributes:
        path: The file.
        size: Its bytes.
        images: Real test images both were run on.
        difference: Largest absolute difference of a logit.
        agreement: Share of images on which both name the same class.
    """

    path: Path
    size: int
    images: int
    difference: float
    agreement: float


def load_student(run: RunDirectory, data: FederatedData | None = None) -> Network:
    """The run's student after its last finished round. Raises `ConfigError` if there is none."""
    checkpoint = run.load_checkpoint()
    if checkpoint is None:
        raise ConfigError(f"{run.path} has no student yet: no round has finished")
    data = data or build_data(run.experiment)
    student = build_network(run.experiment, run.experiment.student.model, data, "student")
    student.load_state_dict(checkpoint["student"])
    return student.eval()


def predict_files(
    run: RunDirectory, files: Iterable[Path], *, top: int = 3
) -> Iterator[tuple[Path, list[tuple[str, float]]]]:
    """The student's most probable classes of image files, best first.

    Pictures are converted to the channels and the size that the student was trained on.

    Raises:
        ConfigError: a file is missing or no image.
    """
    data = build_data(run.experiment)
    student = load_student(run, data)
    for file in files:
        with torch.no_grad():
            probabilities = torch.softmax(student(_open(file, data.test.shape))[0], dim=0)
        best = probabilities.topk(min(top, len(data.classes)))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        yield file, [(data.classes[index], value) for index, value in pairs]


def export_student(run: RunDirectory, format: str, output: Path | None = None) -> Exported:
    """Write the student and check the written file against it on real test images.

    The exported function takes uint8 images (B, channels, h, w), any B, and gives logits (B, C):
    scaling and normalisation are inside.

    Args:
        run: A run with at least one finished round.
        format: `torch` (a `torch.export` program, `.pt2`) or `onnx`.
        output: File to write; default: `student.pt2` or `student.onnx` in the run directory.

    Raises:
        ConfigError: unknown format, or a library for it is not installed.
        RuntimeError: the written file does not do what the student does.
    """
    if format not in FORMATS:
        raise ConfigError(f"--format: expected {' or '.join(FORMATS)}, got {format!r}")
    data = build_data(run.experiment)
    student = load_student(run, data)
    path = output or run.path / FORMATS[format]
    images = data.test.images[:256]
    write = _write_torch if format == "torch" else _write_onnx
    again = write(student, images, path)
    with torch.no_grad():
        expected = student(images)
    difference = float((again - expected).abs().max())
    agreement = float((again.argmax(1) == expected.argmax(1)).double().mean())
    if not difference <= 1e-3 * max(1.0, float(expected.abs().max())):
        raise RuntimeError(
            f"{path} differs from the student by {difference:.3g} in a logit "
            f"(same class on {agreement:.1%} of {len(images)} images); do not use it"
        )
    return Exported(path, path.stat().st_size, len(images), difference, agreement)


def _write_torch(student: nn.Module, images: Tensor, path: Path) -> Tensor:
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(student, (images[:2],), dynamic_shapes=({0: batch},))
    torch.export.save(program, path)
    with torch.no_grad():
        logits: Tensor = torch.export.load(path).module()(images)
    return logits


def _write_onnx(student: nn.Module, images: Tensor, path: Path) -> Tensor:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  (torch.onnx needs it)
    except ImportError as error:
        raise ConfigError(f"--format onnx needs {error.name}: pip install 'fedkd[onnx]'") from None
    torch.onnx.export(
        student,
        (images[:2],),
        str(path),
        dynamo=True,
        external_data=False,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
        verbose=False,
    )
    session = onnxruntime.InferenceSession(  # type: ignore[attr-defined]
        str(path), providers=["CPUExecutionProvider"]
    )
    return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def _open(file: Path, shape: tuple[int, int, int]) -> Tensor:
    channels, height, width = shape
    try:
        with Image.open(file) as picture:
            fitted = picture.convert("L" if channels == 1 else "RGB").resize((width, height))
    except FileNotFoundError:
        raise ConfigError(f"no image file {file}") from None
    except (UnidentifiedImageError, OSError) as error:
        raise ConfigError(f"{file} cannot be read as an image ({error})") from None
    pixels = torch.from_numpy(np.array(fitted, dtype=np.uint8))
    return (pixels[None] if channels == 1 else pixels.permute(2, 0, 1))[None]
