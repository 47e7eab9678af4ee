"""Students as ONNX files, in 8 bits too."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fedkd.config import ConfigError
from fedkd.data.images import ImageSet
from fedkd.models.build import build_model, model_names
from fedkd.runs.export import Trained, export_student, predict_files
from fedkd.runs.onnx_files import BATCHES, OnnxStudent, write_int8
from fedkd.runs.signature import Pictures
from fedkd.training.supervised import fit

pytest.importorskip("onnxruntime")


def stripes(count: int, size: int = 8) -> ImageSet:
    """Bright columns or bright rows under noise."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 2
    pattern = (torch.arange(size) % 2 * 120).expand(size, size)
    images = torch.where((labels == 0)[:, None, None], pattern.T, pattern)
    images = images + torch.randint(100, images.shape, generator=generator)
    return ImageSet(images[:, None].to(torch.uint8), labels, ("across", "down"))


def student(folder: Path, model: str = "cnn_tiny", size: int = 8) -> Trained:
    images = stripes(80, size)
    network = build_model(
        model, num_classes=2, in_channels=1, image_size=size, mean=[0.4], std=[0.2], seed=0
    )
    fit(network, images, epochs=3, batch_size=8, seed=0)
    about = {
        "classes": images.classes,
        "pictures": Pictures(channels=1, height=size, width=size).model_dump(),
    }
    return Trained(
        network.eval(), images.classes, images.shape, about, folder,
        lambda: stripes(60, size), lambda: images.images,
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return student(tmp_path_factory.mktemp("trained"))


def test_eight_bits_answer_as_the_student_and_say_what_they_cost(
    trained: Trained, tmp_path: Path
) -> None:
    done = export_student(trained, "onnx", quantise="int8")
    assert done.path == trained.folder / "student.int8.onnx"
    assert (done.images, done.missing) == (60, None)
    assert done.agreement > 0.95
    assert done.lost is not None
    assert done.lost <= 1
    assert done.difference > 0  # it has been rounded
    assert set(done.milliseconds) == set(BATCHES)
    assert done.unquantised is not None
    assert set(done.unquantised.milliseconds) == set(BATCHES)
    record = json.loads((trained.folder / "student.int8.onnx.json").read_text())
    assert (record["size"], record["lost"]) == (done.path.stat().st_size, done.lost)
    assert record["unquantised"]["size"] == done.unquantised.size
    assert str(tmp_path.parent) not in json.dumps(record)
    assert sorted(path.name for path in trained.folder.iterdir()) == [
        "student.int8.onnx", "student.int8.onnx.json"
    ]  # fmt: skip
    # The file alone names what is in pictures.
    from PIL import Image

    Image.fromarray(stripes(2).images[1, 0].numpy()).save(tmp_path / "down.png")
    opened = Trained.of_file(done.path)
    ((_, best),) = predict_files(opened, [tmp_path / "down.png"])
    assert best[0][0] == "down"
    assert opened.classes == trained.classes
    with pytest.raises(ConfigError, match="this file is exported"):
        export_student(opened, "torch")


class Coarse(nn.Module):
    """A student after a bad quantisation: it names one class."""

    def __init__(self, path: Path, threads: int = 0) -> None:
        super().__init__()

    def forward(self, images: Tensor) -> Tensor:
        return torch.tensor([[1.0, 0.0]]).expand(len(images), 2)


def test_what_costs_more_than_it_may_is_not_written(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "student.onnx"
    monkeypatch.setattr("fedkd.runs.export.OnnxStudent", Coarse)
    monkeypatch.setattr("fedkd.runs.export.write_int8", lambda *_: None)
    with pytest.raises(
        RuntimeError, match=r"costs (49|50)\...? ?.*points .* at most 1 are allowed"
    ):
        export_student(trained, "onnx", path, quantise="int8")
    with pytest.raises(RuntimeError, match=r"at most 5 are allowed: no file is written"):
        export_student(trained, "onnx", path, quantise="int8", max_loss=5)
    assert list(tmp_path.iterdir()) == []


def test_refusals_of_the_export_name_the_option(trained: Trained, tmp_path: Path) -> None:
    for options, message in (
        ({"format": "onnx", "quantise": "int4"}, "--quantise: expected int8, got 'int4'"),
        ({"format": "torch", "quantise": "int8"}, "--quantise int8: needs --format onnx"),
        ({"format": "onnx", "max_loss": 1.0}, "--max-loss: .* give that too"),
        ({"format": "onnx", "quantise": "int8", "max_loss": -1.0}, "--max-loss: expected points"),
        ({"format": "onnx", "quantise": "int8", "max_loss": float("nan")}, "--max-loss: expected"),
    ):
        with pytest.raises(ConfigError, match=message):
            export_student(trained, **options)  # type: ignore[arg-type]

    def gone() -> Tensor:
        raise FileNotFoundError("data set 'mine' is missing")

    with pytest.raises(ConfigError, match=r"ranges come from images .* data set 'mine' is missing"):
        export_student(replace(trained, seen=gone), "onnx", quantise="int8")
    (tmp_path / "a.onnx").write_bytes(b"no such thing")
    with pytest.raises(ConfigError, match=r"a.onnx: not an ONNX file that can be used"):
        Trained.of_file(tmp_path / "a.onnx")


@pytest.mark.slow
@pytest.mark.parametrize("model", [name for name in model_names() if "/" not in name])
def test_every_architecture_goes_into_eight_bits(model: str, tmp_path: Path) -> None:
    done = export_student(student(tmp_path, model, 32), "onnx", quantise="int8", max_loss=5)
    assert done.agreement >= 0.95


def test_a_vision_transformer_takes_any_batch_in_eight_bits(tmp_path: Path) -> None:
    from fedkd.runs.onnx_files import write_onnx

    trained = student(tmp_path, "vit_tiny")
    images = trained.test().images
    write_onnx(trained.network, images, tmp_path / "s.onnx", "")
    write_int8(tmp_path / "s.onnx", tmp_path / "q.onnx", trained.seen())
    both = [OnnxStudent(tmp_path / f"{name}.onnx")(images).argmax(1) for name in "sq"]
    assert (both[0] == both[1]).double().mean() >= 0.95
