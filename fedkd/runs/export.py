"""The student as one file, and the student at work on a picture."""

from __future__ import annotations

import json
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedkd.build import data_root
from fedkd.config import ConfigError
from fedkd.data.heads import spans
from fedkd.data.images import ImageSet
from fedkd.data.pairs import read_pairs, stacked
from fedkd.data.pictures import SUFFIXES, read_picture, shown
from fedkd.data.splits import FederatedData
from fedkd.data.transfer import conform
from fedkd.io.tensors import State
from fedkd.models.network import Network
from fedkd.models.peft import merged
from fedkd.runs.directory import RunDirectory, network_hash, write_json
from fedkd.runs.hub import read_folder, write_folder
from fedkd.runs.images import run_data
from fedkd.runs.onnx_files import OnnxStudent, milliseconds, write_int8, write_onnx
from fedkd.runs.signature import SIGNATURE, Signature, read_signature
from fedkd.training.evaluation import accuracy

FORMATS = {"torch": "student.pt2", "onnx": "student.onnx", "safetensors": "student"}
CHECKED = 256  # images on which an exported file is compared with the student
TESTED = 2000  # test images on which a quantised one is
RANGES = 200  # images that its ranges come from


@dataclass(frozen=True)
class Trained:
    """A student ready for use, wherever it was trained.

    Attributes:
        network: In evaluation mode on the CPU.
        classes: Names in label order.
        shape: (channels, height, width) of the images it takes.
        about: What an exported file says of it.
        folder: Where it lies.
        test: Gives its test images; raises where they are not at hand.
        seen: Gives images that it learnt from, likewise.
        together: Of a student that sees several modalities at once, the shape of each.
        heads: Of a student with several heads, how many of the classes each has.
        temperature: What its logits are divided by before they are probabilities.
        summary: What its run came to; empty where that is not known.
        recipe: What it was trained with, in words.
    """

    network: Network | OnnxStudent | nn.Module
    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    about: Mapping[str, Any]
    folder: Path
    test: Callable[[], ImageSet]
    seen: Callable[[], Tensor]
    together: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)
    heads: Mapping[str, int] = field(default_factory=dict)
    temperature: float = 1.0
    summary: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, str] = field(default_factory=dict)

    def __call__(self, images: Tensor) -> Tensor:
        """Probabilities (B, C) of uint8 images (B, channels, height, width), of each head."""
        with torch.no_grad():
            logits: Tensor = self.network(images)
        parts = spans(self.heads or {"": len(self.classes)}).values()
        each = [torch.softmax(logits[:, part] / self.temperature, dim=1) for part in parts]
        return torch.cat(each, dim=1)

    def predict(self, file: str | Path, top: int = 3) -> list[tuple[str, float]]:
        """The most probable classes of a picture file, best first. Raises as `predict_files`."""
        ((_, answers),) = predict_files(self, [Path(file)], top=top)
        return answers

    @classmethod
    def of(cls, run: RunDirectory) -> Trained:
        """A run's. Raises `ConfigError` if it has none yet, or one of its files is damaged."""
        signature = signature_of(run)
        together = signature.together or {}
        network = _load(run, signature)
        summary = run.read_json("summary.json") or {}
        if summary.get("hash") != network_hash(network):  # of another round
            summary = {}
        temperature = float((summary.get("temperature") or {}).get("value", 1.0))
        # Nothing of the machine that it was made on.
        about = signature.model_dump(mode="json", exclude={"root", "plugins"})
        return cls(
            network,
            signature.classes,
            signature.shape,
            {**about, "temperature": temperature},
            run.path,
            lambda: run_data(run).test,
            lambda: run_data(run).transfer.images.images,
            {n: together[n].shape for n in signature.modality if n in together},
            signature.heads or {},
            temperature,
            summary,
            _recipe(run),
        )

    @classmethod
    def of_file(cls, path: Path) -> Trained:
        """A student exported to `.onnx` or `.pt2`. Raises `ConfigError` if the file is none."""
        try:
            if path.suffix == ".pt2":
                if not zipfile.is_zipfile(path):
                    raise ValueError("not an archive")  # torch would write much about it
                extra_files = {SIGNATURE: ""}
                student: OnnxStudent | nn.Module = torch.export.load(
                    path, extra_files=extra_files
                ).module()
                return cls._of_about(student, json.loads(extra_files[SIGNATURE]), path)
            student = OnnxStudent(path)
            return cls._of_about(student, json.loads(student.about or ""), path)
        except (ValueError, KeyError, TypeError, RuntimeError, OSError) as error:
            problem = str(error) if str(error).startswith(f"{path}: ") else (
                f"{path}: expected an {path.suffix} file that fedkd export wrote, this one does "
                "not say which classes and pictures it is for"
            )  # fmt: skip
            raise ConfigError(problem) from None

    @classmethod
    def of_folder(cls, folder: Path) -> Trained:
        """A student exported with `--format safetensors`. Raises `ConfigError` if it is none."""
        network, about = read_folder(folder)
        return cls._of_about(network, about, folder / "config.json")

    @classmethod
    def _of_about(
        cls, student: OnnxStudent | nn.Module, about: Mapping[str, Any], path: Path
    ) -> Trained:
        """What an export holds, with what it says about itself. Raises if that is not enough."""
        pictures = about["pictures"]
        shape = (int(pictures["channels"]), int(pictures["height"]), int(pictures["width"]))
        classes = tuple(map(str, about["classes"]))
        own = about.get("together") or {}
        together = {
            str(name): (
                int(own[name]["channels"]),
                int(own[name]["height"]),
                int(own[name]["width"]),
            )
            for name in about.get("modality", ())
            if name in own
        }

        def nothing() -> Any:
            raise ConfigError(f"{path}: the images of an exported student are not known")

        temperature = float(about.get("temperature", 1.0))
        heads = {str(name): int(n) for name, n in (about.get("heads") or {}).items()}
        return cls(
            student, classes, shape, about, path.parent, nothing, nothing, together, heads,
            temperature,
        )  # fmt: skip


@dataclass(frozen=True)
class Exported:
    """An exported student and how it compares to the original.

    Attributes:
        path: The file.
        size: Its bytes.
        images: Images that both were run on.
        difference: Largest absolute difference of a logit.
        agreement: Share of images on which both name the same class.
        missing: Why the images are noise and not the test images; None if they are test images.
        milliseconds: Of an .onnx file, batch size -> time for an image, with one thread.
        lost: Of a quantised file, points of accuracy (0 to 100) that it is below the student.
        unquantised: Of a quantised file, the one that it was made from, which is not kept.
    """

    path: Path
    size: int
    images: int
    difference: float
    agreement: float
    missing: str | None = None
    milliseconds: Mapping[int, float] = field(default_factory=dict)
    lost: float | None = None
    unquantised: Exported | None = None


def load_student(run: RunDirectory, data: FederatedData | None = None) -> Network:
    """The run's student after its last finished round, in evaluation mode on the CPU.

    Needs the run's folder alone: no data set and no particular working directory.

    Args:
        run: The run.
        data: Its images, for a run of an older fedkd that has no `signature.json`; None: looked
            for where the config says, if that is needed.

    Raises:
        ConfigError: there is no student yet, or one of its files is damaged.
    """
    return _load(run, signature_of(run, data))


def signature_of(run: RunDirectory, data: FederatedData | None = None) -> Signature:
    """What the run's networks take and give; where no signature is kept, what its images show.

    Raises:
        ConfigError: the file is damaged, or the images are not those of the run.
        FileNotFoundError: an older run's images are missing.
    """
    signature = read_signature(run)
    if signature is not None:
        return signature
    try:
        return Signature.of(run.experiment, data or run_data(run), data_root(run.experiment))
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{run.path} has no {SIGNATURE} (an older fedkd made it), so its student needs the "
            f"images it was made with: {error}"
        ) from None


def predict_files(
    run: RunDirectory | Trained,
    files: Iterable[Path],
    *,
    top: int = 3,
    on_error: Callable[[str], None] | None = None,
) -> Iterator[tuple[Path, list[tuple[str, float]]]]:
    """The student's most probable classes of picture files, best first.

    Pictures are read by the function that reads training folders: upright, in the channels and
    the size that the student was trained on, without regard to their aspect ratio. A student that
    sees several modalities at once takes .npz files with `x_MODALITY` of each, a row a sample.

    Args:
        run: The run, or another student.
        files: Picture files; a folder stands for all pictures in it and below, hidden ones less.
        top: Classes per picture, of each head where there are several; all if there are fewer.
        on_error: Called for each file that cannot be read, which is then passed over; None: the
            first one raises.

    Raises:
        ConfigError: a file is missing or no picture, or the student cannot be loaded.
    """
    if top < 1:
        raise ConfigError(f"--top: expected at least 1, got {top}")
    student = run if isinstance(run, Trained) else Trained.of(run)
    return _predictions(student, files, top, on_error)


def _predictions(
    student: Trained, files: Iterable[Path], top: int, on_error: Callable[[str], None] | None
) -> Iterator[tuple[Path, list[tuple[str, float]]]]:
    for place in files:
        try:
            found = _pairs(Path(place), student) if student.together else _pictures(Path(place))
        except (ValueError, FileNotFoundError) as error:
            _say(error, on_error)
            continue
        for file in found:
            try:
                pixels = file[1] if isinstance(file, tuple) else _read(file, student.shape)
            except ValueError as error:
                _say(error, on_error)
                continue
            file = file[0] if isinstance(file, tuple) else file
            probabilities = student(pixels[None])[0]
            if not probabilities.isfinite().all():
                raise RuntimeError(
                    f"the student's logits for {file} are not finite: its weights are not usable"
                )
            parts = spans(student.heads or {"": len(student.classes)})
            each = [_best(student, probabilities, part, top) for part in parts.values()]
            yield file, [pair for best in each for pair in best]


def _best(
    student: Trained, probabilities: Tensor, part: slice, top: int
) -> list[tuple[str, float]]:
    """The most probable of some of the classes, best first."""
    names = student.classes[part]
    best = probabilities[part].topk(min(top, len(names)))
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [(names[index], value) for index, value in pairs]


def _read(file: Path, shape: tuple[int, int, int]) -> Tensor:
    channels, height, width = shape
    pixels = read_picture(file, channels=channels, height=height, width=width)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _pairs(place: Path, student: Trained) -> list[tuple[Path, Tensor]]:
    """Samples of a file of pairs, each called FILE[row]. Raises `ValueError`."""
    names = " and ".join(student.together)
    if place.suffix != ".npz":
        raise ValueError(
            f"{shown(place)}: the student sees {names} together: expected an .npz file with "
            + ", ".join(f"x_{name}" for name in student.together)
        )
    sets = read_pairs(place, dict.fromkeys(student.together, student.classes))
    fitting = [conform(sets[name], shape) for name, shape in student.together.items()]
    return [
        (place.with_name(f"{place.name}[{row}]"), pixels)
        for row, pixels in enumerate(stacked(fitting).images)
    ]


def _say(error: Exception, on_error: Callable[[str], None] | None) -> None:
    if on_error is None:
        raise ConfigError(str(error)) from None
    on_error(str(error))


def _pictures(place: Path) -> list[Path]:
    """The picture files that an argument stands for. Raises `ValueError`."""
    if not place.is_dir():
        return [place]
    found = sorted(
        path
        for path in place.rglob("*")
        if path.suffix.lower() in SUFFIXES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(place).parts)
    )
    if not found:
        raise ValueError(f"{shown(place)}: no pictures in this folder ({', '.join(SUFFIXES)})")
    return found


def export_student(
    run: RunDirectory | Trained,
    format: str,
    output: Path | None = None,
    *,
    quantise: str | None = None,
    max_loss: float | None = None,
) -> Exported:
    """Write the student and check the written file against it.

    The check is on real test images, or on noise where the run's images are not at hand. The
    exported function takes uint8 images (B, channels, h, w), any B, and gives logits (B, C):
    scaling and normalisation are inside. Class names and the rest of `signature.json` are in the
    file too.

    Args:
        run: A run with at least one finished round, or another student.
        format: `torch` (a `torch.export` program, `.pt2`), `onnx`, or `safetensors` (a folder
            with weights, what they need, and a model card, as hubs take it).
        output: File to write, or of `safetensors` a folder; default: `student.pt2`,
            `student.onnx` (`student.int8.onnx`) or `student` in the run directory.
        quantise: `int8`: 8-bit weights and activations, whose ranges come from images that the
            student learnt from. What it comes to is written beside the file, as `.json`.
        max_loss: Points of test accuracy (0 to 100) that this may cost; None: one.

    Raises:
        ConfigError: unknown format, a library for it is not installed, no such folder, or images
            are missing that are needed.
        RuntimeError: the written file does not do what the student does; it is not kept then.
    """
    if format not in FORMATS:
        raise ConfigError(f"--format: expected {' or '.join(FORMATS)}, got {format!r}")
    _check_quantised(format, quantise, max_loss)
    student = run if isinstance(run, Trained) else Trained.of(run)
    name = FORMATS[format] if quantise is None else f"student.{quantise}.onnx"
    path = output or student.folder / name
    folder = format == "safetensors"
    if not path.parent.is_dir() or (path.is_file() if folder else path.is_dir()):
        if folder and path.is_file():
            raise ConfigError(f"--output: expected a folder to write, {path}: is a file")
        problem = "is a folder" if path.is_dir() else f"there is no folder {path.parent}"
        raise ConfigError(f"--output: expected a file to write, {path}: {problem}")
    if not isinstance(student.network, Network):
        raise ConfigError("RUN: expected a run or a student of a study; this file is exported")
    if quantise is not None and student.heads:
        raise ConfigError(
            "--quantise int8: what it costs is measured by one answer to an image, and this "
            f"student has several ({', '.join(student.heads)}); leave it out"
        )
    if quantise is not None:
        return _quantised(student, path, 1.0 if max_loss is None else max_loss)
    return _exported(student, format, path)


def _check_quantised(format: str, quantise: str | None, max_loss: float | None) -> None:
    if quantise not in (None, "int8"):
        raise ConfigError(f"--quantise: expected int8, got {quantise!r}")
    if quantise is not None and format != "onnx":
        raise ConfigError(f"--quantise {quantise}: needs --format onnx, got {format!r}")
    if quantise is None and max_loss is not None:
        raise ConfigError("--max-loss: bounds what --quantise int8 costs; give that too")
    if max_loss is not None and not 0 <= max_loss <= 100:
        raise ConfigError(f"--max-loss: expected points of accuracy, 0 to 100, got {max_loss:g}")


def _exported(student: Trained, format: str, path: Path) -> Exported:
    images, missing = _images(student)
    assert isinstance(student.network, Network)
    with torch.no_grad():
        expected = student.network(images)
    if format == "safetensors":
        written = write_folder(
            student.network, path, student.about, student.summary, student.recipe
        )
        with torch.no_grad():
            again = written(images)
    else:
        whole = merged(student.network).eval()
        write = _write_torch if format == "torch" else write_onnx
        again = write(whole, images, path, json.dumps(student.about))
    difference, agreement = _compared(again, expected)
    if not difference <= 1e-3 * max(1.0, float(expected.abs().max())):
        raise RuntimeError(
            f"{path} differs from the student by {difference:.3g} in a logit "
            f"(same class on {agreement:.1%} of {len(images)} images); do not use it"
        )
    spent = milliseconds(path, images) if format == "onnx" else {}
    files = path.iterdir() if path.is_dir() else [path]
    size = sum(file.stat().st_size for file in files)
    return Exported(path, size, len(images), difference, agreement, missing, spent)


def _quantised(student: Trained, path: Path, limit: float) -> Exported:
    """Write the student in 8 bits, unless that costs more points than it may."""
    try:
        test, seen = student.test(), student.seen()[:RANGES]
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise ConfigError(
            "--quantise int8: ranges come from images that the student learnt from, and what it "
            f"costs is measured on test images, which are not here: {error}"
        ) from None
    assert test.labels is not None
    images, labels = test.images[:TESTED], test.labels[:TESTED]
    draft = path.with_name(f"{path.name}.draft")
    with tempfile.TemporaryDirectory() as folder:
        before = _exported(student, "onnx", Path(folder) / "student.onnx")
        try:
            write_int8(before.path, draft, seen)
            with torch.no_grad():
                expected, again = student.network(images), OnnxStudent(draft)(images)
            difference, agreement = _compared(again, expected)
            lost = 100 * (accuracy(expected, labels) - accuracy(again, labels))
            if lost > limit:
                raise RuntimeError(
                    f"int8 costs {lost:.2f} points of accuracy on {len(images):,} test images "
                    f"(same class on {agreement:.1%}), at most {limit:g} are allowed: no file is "
                    "written; allow more with --max-loss, or leave out --quantise"
                )
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)
    size, spent = path.stat().st_size, milliseconds(path, images)
    before = replace(before, path=path.with_name(before.path.name))
    done = Exported(path, size, len(images), difference, agreement, None, spent, lost, before)
    record = {"max_loss": limit, **_record(done), "unquantised": _record(before)}
    write_json(path.with_name(f"{path.name}.json"), record)
    return done


def _record(exported: Exported) -> dict[str, object]:
    """What it comes to, as plain values and without the machine's paths."""
    names = ("size", "images", "difference", "agreement", "lost", "milliseconds")
    values = {name: getattr(exported, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def _compared(again: Tensor, expected: Tensor) -> tuple[float, float]:
    """Largest difference of a logit, and the share of images with the same class."""
    same = (again.argmax(1) == expected.argmax(1)).double().mean()
    return float((again - expected).abs().max()), float(same)


def _images(student: Trained) -> tuple[Tensor, str | None]:
    """Images to compare two networks on: test images, or noise and why there is nothing better."""
    try:
        return student.test().images[:CHECKED], None
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        noise = torch.Generator().manual_seed(0)
        size = (CHECKED, *student.shape)
        pixels = torch.randint(256, size, generator=noise, dtype=torch.uint8)
        return pixels, " ".join(str(error).split())


def _recipe(run: RunDirectory) -> dict[str, str]:
    """What a run trained its student with, in words for a model card."""
    experiment = run.experiment
    data, recipe = experiment.data, experiment.distillation
    return {
        "teachers": ", ".join(dict.fromkeys(each.name for each in experiment.teachers.models)),
        "clients and rounds": f"{experiment.clients}, {experiment.rounds}",
        "data set": f"{data.dataset.name}, dealt by {data.partition.name}",
        "transfer set": f"{data.transfer.size:,} images, "
        f"{'labelled' if data.transfer.labelled else 'without labels'}",
        "fusion": ", ".join(rule.name for rule in experiment.fusion),
        "losses": ", ".join(term.name for term in recipe.losses),
        "epochs": f"{recipe.epochs} in each round",
        "seed": str(experiment.seed),
    }


def _load(run: RunDirectory, signature: Signature) -> Network:
    model = signature.student
    state = _checkpoint(run)["student"]
    network = signature.network(model, run)
    try:
        network.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"{run.path}: the weights in checkpoints/ are not those of the model {model.name!r} "
            f"({reason})"
        ) from None
    return network.eval()


def _checkpoint(run: RunDirectory) -> State:
    checkpoint = run.load_kept()
    if checkpoint is not None and "student" in checkpoint:
        return checkpoint
    if any((run.path / "checkpoints").glob("round-*.pt")):
        raise ConfigError(f"{run.path}: none of the checkpoints in checkpoints/ can be read")
    raise ConfigError(f"{run.path} has no student yet: no round has finished")


def _write_torch(student: nn.Module, images: Tensor, path: Path, about: str) -> Tensor:
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(student, (images[:2],), dynamic_shapes=({0: batch},))
    torch.export.save(program, path, extra_files={SIGNATURE: about})
    with torch.no_grad():
        logits: Tensor = torch.export.load(path).module()(images)
    return logits
