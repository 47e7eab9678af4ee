"""A run carries what its student needs: no data set, no working directory, no guessing."""

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fedkd
from fedkd.config import ConfigError, make_experiment
from fedkd.models import MODELS
from fedkd.reporting.run_page import write_report
from fedkd.reporting.run_record import Found
from fedkd.rounds import Server, context_of_run
from fedkd.runs.directory import RunDirectory, network_hash, write_json
from fedkd.runs.events import MessageCounted, RoundFinished
from fedkd.runs.export import export_student, load_student, predict_files
from fedkd.runs.signature import SIGNATURE, read_signature
from fedkd.simulations.cli.contribution import contribution
from fedkd.simulations.cli.status import status_of
from fedkd.simulations.client_app import _given_root
from fedkd.simulations.local import run_local

NAMES = ("left", "top")


def picture(rng: np.random.Generator, name: str) -> Image.Image:
    """A class is a direction: the half that is bright."""
    pixels = rng.integers(0, 60, (20, 20, 3)).astype(np.uint8)
    half = pixels[:10] if name == "top" else pixels[:, :10]
    half += 150
    return Image.fromarray(pixels)


def small(folder: Path, **more: object) -> dict:
    """Values of an experiment of a second, with relative data in `folder`."""
    return {
        "name": "moved", "rounds": 1, "clients": 2, "output": str(folder / "runs"),
        "data": {"dataset": {"name": "npz", "path": "mine.npz"}, "transfer": {"size": 20},
                 "partition": "iid"},
        "teachers": {"models": ["mlp"], "epochs": 1}, "student": {"model": "mlp"},
        "distillation": {"losses": ["kd"], "epochs": 1}, "evaluation": {"baselines": []},
        **more,
    }  # fmt: skip


def write_arrays(file: Path, shift: int = 0) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (80, 8, 8), dtype=np.uint8)
    np.savez(file, x=pixels + np.uint8(shift), y=np.arange(80) % 2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A run on a folder of pictures, with an assistant; its data stay where they were."""
    folder = tmp_path_factory.mktemp("trained")
    rng = np.random.default_rng(0)
    for name in NAMES:
        (folder / "pictures" / name).mkdir(parents=True)
        for number in range(30):
            picture(rng, name).save(folder / "pictures" / name / f"{number}.png")
    values = small(
        folder,
        data={"dataset": {"name": "image_folder", "path": "pictures", "size": 12},
              "transfer": {"size": 20}, "partition": "iid"},
        teachers={"models": ["mlp"], "epochs": 8, "optimizer": {"lr": 0.02}},
        distillation={"losses": ["kd"], "epochs": 15, "batch_size": 8, "assistants": ["mlp"]},
        fusion=["sample_count"],
    )  # fmt: skip
    before = Path.cwd()
    os.chdir(folder)
    try:
        return run_local(make_experiment(values))
    finally:
        os.chdir(before)


@pytest.fixture
def copied(trained: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    """The run on another machine, as it were: no data where they were, elsewhere in the tree."""
    shutil.copytree(trained.path, tmp_path / "copy" / trained.path.name)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    run = RunDirectory.open(tmp_path / "copy" / trained.path.name)
    change(run, root=str(tmp_path / "gone"))
    return run


def change(run: RunDirectory, **values: object) -> None:
    """Write other values into a signature; without a checksum it is taken as it stands."""
    content = {**run.read_json(SIGNATURE), **values}
    content.pop("checksum", None)
    write_json(run.path / SIGNATURE, content)


def test_a_student_needs_the_runs_folder_alone(copied: RunDirectory, tmp_path: Path) -> None:
    student = load_student(copied)
    assert network_hash(student) == copied.read_json("summary.json")["hash"]
    file = tmp_path / "one.png"
    picture(np.random.default_rng(5), "top").save(file)
    ((_, best),) = predict_files(copied, [file])
    assert best[0][0] == "top"
    assert sum(chance for _, chance in best) == pytest.approx(1)


@pytest.mark.parametrize("format", ["torch", "onnx"])
def test_an_export_without_the_data_is_checked_on_noise_and_says_so(
    copied: RunDirectory, tmp_path: Path, format: str
) -> None:
    file = tmp_path / f"student.{format}"
    done = export_student(copied, format, file)
    assert "pictures" in done.missing
    assert (done.agreement, done.images) == (1, 256)
    if format == "torch":
        about = {SIGNATURE: ""}
        torch.export.load(file, extra_files=about)
        text = about[SIGNATURE]
    else:
        onnxruntime = pytest.importorskip("onnxruntime")
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        text = session.get_modelmeta().custom_metadata_map[SIGNATURE]
    assert json.loads(text)["classes"] == list(NAMES)
    assert str(tmp_path) not in text


def test_an_export_beside_the_data_is_checked_on_test_images(
    trained: RunDirectory, tmp_path: Path
) -> None:
    done = export_student(trained, "torch", tmp_path / "s.pt2")
    assert (done.missing, done.images, done.agreement) == (None, 12, 1)
    for wrong in (tmp_path / "no" / "s.pt2", tmp_path):
        with pytest.raises(ConfigError, match="--output"):
            export_student(trained, "torch", wrong)


def test_a_picture_is_read_as_in_training(copied: RunDirectory, tmp_path: Path) -> None:
    upright = picture(np.random.default_rng(7), "top")
    upright.save(tmp_path / "plain.png")
    exif = Image.Exif()
    exif[0x112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "phone.png", exif=exif)
    small_one = upright.resize((12, 12), Image.Resampling.BILINEAR)
    small_one.save(tmp_path / "resized.png")
    answers = [best for _, best in predict_files(copied, sorted(tmp_path.glob("*.png")))]
    assert answers[0] == answers[1] == answers[2]


def test_what_cannot_be_read_costs_no_other_picture(copied: RunDirectory, tmp_path: Path) -> None:
    folder = tmp_path / "many"
    (folder / ".hidden").mkdir(parents=True)
    rng = np.random.default_rng(3)
    for name in ("a.png", "z.png", ".hidden/h.png", ".dot.png"):
        picture(rng, "left").save(folder / name)
    (folder / "b.jpg").write_text("no picture")
    (folder / "notes.txt").write_text("no picture either")
    deep = np.full((20, 20), 4000, np.uint16)
    Image.fromarray(deep).save(folder / "c.png")
    problems: list[str] = []
    asked = [folder, tmp_path / "no.png", tmp_path / "empty", folder / "a.png"]
    answered = [file.name for file, _ in predict_files(copied, asked, on_error=problems.append)]
    assert answered == ["a.png", "z.png", "a.png"]
    assert len(problems) == 4
    for problem, name in zip(problems, ("b.jpg", "c.png", "no.png", "empty"), strict=True):
        assert name in problem
        assert "\n" not in problem
    with pytest.raises(ConfigError, match=r"b\.jpg"):
        list(predict_files(copied, [folder]))


def test_top_is_bounded_by_the_classes(copied: RunDirectory, tmp_path: Path) -> None:
    file = tmp_path / "one.png"
    picture(np.random.default_rng(5), "top").save(file)
    ((_, best),) = predict_files(copied, [file], top=99)
    assert {name for name, _ in best} == set(NAMES)
    for top in (0, -1):
        with pytest.raises(ConfigError, match="--top: expected at least 1"):
            predict_files(copied, [file], top=top)


def test_classes_are_those_of_the_run_and_not_of_todays_folder(
    trained: RunDirectory, copied: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(Path(read_signature(trained).root) / "pictures", tmp_path / "now" / "pictures")
    change(copied, root=str(tmp_path / "now"))
    found = Found(copied)
    assert found.data_problem is None
    shutil.copytree(tmp_path / "now" / "pictures" / "top", tmp_path / "now" / "pictures" / "bottom")
    found = Found(copied)
    assert found.classes == list(NAMES)
    assert found.data is None
    assert "new: bottom; gone: none" in found.data_problem
    with pytest.raises(ConfigError, match=r"classes are not those .*new: bottom"):
        contribution(copied.path)
    assert export_student(copied, "torch", tmp_path / "s.pt2").missing is not None
    # An older run has its class names in its summary.
    (copied.path / SIGNATURE).unlink()
    monkeypatch.chdir(tmp_path / "now")
    assert Found(copied).classes == list(NAMES)
    with pytest.raises(ConfigError, match="new: bottom"):
        context_of_run(copied)


def test_a_run_of_an_older_version_finds_its_student_by_its_data(
    trained: RunDirectory, copied: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = read_signature(trained).root
    (copied.path / SIGNATURE).unlink()
    with pytest.raises(FileNotFoundError, match=r"has no signature.json .* misses"):
        load_student(copied)
    monkeypatch.chdir(root)
    assert network_hash(load_student(copied)) == network_hash(load_student(trained))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"format": 2}, "format 2"),
        ({"classes": []}, "classes"),
        ({"classes": "ab"}, "classes"),
        ({"mean": [0.5]}, "mean"),
        ({"std": [0.5, float("nan"), 1]}, "std"),
        ({"pictures": {"channels": 3, "height": 12, "width": 10}}, "square"),
        ({"pictures": {"channels": 3, "height": 12, "width": 12, "filter": "nearest"}}, "filter"),
        ({"pictures": 3}, "pictures"),
        ({"student": {"name": "mlpp"}}, "unknown model 'mlpp'; did you mean 'mlp'"),
        ({"student": {"name": "mlp", "hidden": 7}}, "not those of the model 'mlp'"),
        ({"classes": ["a", "b", "c"]}, "not those of the model 'mlp'"),
        ({"strange": 1}, "strange"),
        ({"checksum": "0" * 16}, "checksum"),
    ],
)
def test_a_damaged_signature_is_one_line(
    copied: RunDirectory, values: dict[str, object], expected: str
) -> None:
    content = copied.read_json(SIGNATURE) | values
    (copied.path / SIGNATURE).write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=expected) as refusal:
        load_student(copied)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", '"\\ud800"'])
def test_a_signature_that_is_no_mapping_is_one_line(copied: RunDirectory, text: str) -> None:
    (copied.path / SIGNATURE).write_text(text)
    with pytest.raises((ConfigError, FileNotFoundError), match=SIGNATURE):
        load_student(copied)


def test_a_run_without_a_readable_checkpoint_says_so(
    copied: RunDirectory, caplog: pytest.LogCaptureFixture
) -> None:
    (file,) = (copied.path / "checkpoints").glob("*.pt")
    file.write_bytes(b"damaged")
    with pytest.raises(ConfigError, match="none of the checkpoints"):
        load_student(copied)
    assert f"{file.name} is passed over" in caplog.text
    file.unlink()
    with pytest.raises(ConfigError, match="no round has finished"):
        load_student(copied)


# -- relative data ---------------------------------------------------------------------------------


@pytest.fixture
def halfway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    """A run of two rounds on relative arrays that was ended after the first one."""
    write_arrays(tmp_path / "mine.npz")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)

    def stop(event: str, **facts: object) -> None:
        if event == "round_start" and facts["round"] == 2:
            raise KeyboardInterrupt

    run = RunDirectory.new(make_experiment(small(tmp_path, rounds=2)))
    with pytest.raises(KeyboardInterrupt):
        run_local(run.experiment, run=run, notify=stop)
    return run


def test_a_run_goes_on_from_another_working_directory(
    halfway: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = (halfway.path / "config.yaml").read_bytes()
    undisturbed = run_local(halfway.experiment)
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = run_local(halfway.experiment, run=RunDirectory.open(halfway.path))
    hashes = {run.read_json("summary.json")["hash"] for run in (undisturbed, again)}
    assert len(hashes) == 1
    assert (again.path / "config.yaml").read_bytes() == config  # nodes have other folders


def test_a_run_does_not_go_on_with_other_images(
    halfway: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_arrays(tmp_path / "mine.npz", shift=9)
    (tmp_path / "elsewhere" / "mine.npz").symlink_to(tmp_path / "mine.npz")
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="fingerprint of the transfer set was"):
        run_local(halfway.experiment, run=halfway)


def test_a_run_does_not_go_on_with_another_student(halfway: RunDirectory, tmp_path: Path) -> None:
    other = make_experiment(small(tmp_path, rounds=2, student={"model": "cnn_tiny"}))
    with pytest.raises(ConfigError, match=r"student\.model was mlp .* is cnn_tiny"):
        Server(context_of_run(halfway, other), halfway)


def test_total_seconds_are_those_of_all_sessions(halfway: RunDirectory, lean: None) -> None:
    (first,) = halfway.read_json("sessions.json")
    halfway.write_json("sessions.json", [first | {"seconds": 1000.0}])
    run_local(halfway.experiment, run=halfway)
    total = halfway.read_json("summary.json")["seconds"]["total"]
    sessions = halfway.read_json("sessions.json")
    assert total == pytest.approx(1000 + sessions[1]["seconds"], abs=5)
    assert total > 1000
    # A session that was killed went on until its last message.
    halfway.count(
        MessageCounted(round=2, phase="train", client=0, down=1, up=1, time=first["started"] + 5e6)
    )
    halfway.write_json("sessions.json", [first])
    run_local(halfway.experiment, run=halfway)
    assert 5e6 <= halfway.read_json("summary.json")["seconds"]["total"] < 5e6 + 1000


def test_a_run_of_an_older_version_counts_the_rounds_it_had(halfway: RunDirectory) -> None:
    (halfway.path / "sessions.json").unlink()
    (done,) = halfway.events(RoundFinished)
    done.seconds["train"] = 500.0
    (halfway.path / "metrics.jsonl").unlink()
    halfway.record(done)
    run_local(halfway.experiment, run=halfway)
    assert 500 < halfway.read_json("summary.json")["seconds"]["total"] < 1000


def test_a_nodes_own_state_makes_the_servers_path_void(tmp_path: Path) -> None:
    job = {"data-root": str(tmp_path)}
    assert _given_root({}, job) == str(tmp_path)
    assert _given_root({"state-dir": "/somewhere"}, job) is None
    assert _given_root({}, {"data-root": str(tmp_path / "not here")}) is None
    assert _given_root({}, {}) is None


# -- plugins ---------------------------------------------------------------------------------------

PLUGIN = '''
from torch import nn
from fedkd.models import MODELS

@MODELS.register("my_tiny")
def my_tiny(num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    """One linear layer."""
    return nn.Sequential(nn.Flatten(), nn.Linear(in_channels * image_size**2, num_classes))
'''


def test_a_students_plugin_is_found_or_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_arrays(tmp_path / "mine.npz")
    (tmp_path / "my_plugin.py").write_text(PLUGIN)
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        values = small(tmp_path, plugins=["my_plugin"], student={"model": "my_tiny"})
        path = run_local(make_experiment(values)).path
        hash = network_hash(load_student(RunDirectory.open(path)))

    def forget() -> None:
        sys.modules.pop("my_plugin", None)
        MODELS._members.pop("my_tiny", None)

    forget()
    assert status_of(path).state == "finished"  # its state is shown without
    with pytest.raises(ConfigError, match=r"'my_plugin' is not imported: .* add --trust"):
        load_student(RunDirectory.open(path))
    run = RunDirectory.open(path, trust=True)
    with pytest.raises(ConfigError, match=r"cannot import 'my_plugin' .* it was .*my_plugin\.py"):
        load_student(run)
    with pytest.raises(ConfigError, match="cannot import 'my_plugin'"):
        run_local(run.experiment, run=run)
    with monkeypatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        assert network_hash(load_student(run)) == hash
    forget()


@pytest.mark.parametrize("format", ["torch", "safetensors"])
def test_an_export_is_used_without_its_run(
    copied: RunDirectory, tmp_path: Path, format: str
) -> None:
    at_work = fedkd.load_student(copied.path)
    done = export_student(copied, format, tmp_path / "exported" if format != "torch" else None)
    assert (done.difference, done.agreement) == (0, 1)
    moved = tmp_path / f"elsewhere{done.path.suffix}"
    shutil.move(done.path, moved)
    shutil.rmtree(copied.path)
    student = fedkd.load_student(str(moved))
    assert (student.classes, student.shape) == (NAMES, (3, 12, 12))
    assert student.temperature == at_work.temperature != 1
    picture(np.random.default_rng(9), "top").save(tmp_path / "new.png")
    assert student.predict(tmp_path / "new.png") == at_work.predict(tmp_path / "new.png")
    pixels = torch.randint(256, (2, 3, 12, 12), dtype=torch.uint8)
    assert torch.equal(student(pixels), at_work(pixels))
    assert torch.allclose(student(pixels).sum(1), torch.ones(2))


def test_the_model_card_has_the_runs_numbers_and_leaves_the_licence_open(
    copied: RunDirectory, tmp_path: Path
) -> None:
    folder = export_student(copied, "safetensors", tmp_path / "hub").path
    assert sorted(file.name for file in folder.iterdir()) == [
        "README.md", "config.json", "model.safetensors",
    ]  # fmt: skip
    card, summary = (folder / "README.md").read_text("utf-8"), copied.read_json("summary.json")
    assert card.startswith("---\nlibrary_name: fedkd\n")
    assert "# license: which one is yours to say" in card
    assert f"| accuracy | {100 * summary['student']['accuracy']:.1f} % |" in card
    assert f"| hash | {summary['hash']} |" in card
    assert "| losses | kd |" in card
    assert "| fusion | sample_count |" in card
    assert str(tmp_path) not in card + (folder / "config.json").read_text("utf-8")
    (folder / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="not a folder that fedkd export --format safetensors"):
        fedkd.load_student(folder)
    with pytest.raises(ConfigError, match=r"expected a run's folder, an \.onnx or \.pt2 file"):
        fedkd.load_student(folder / "README.md")
    (tmp_path / "a.pt2").write_bytes(b"none")
    with pytest.raises(ConfigError, match=r"expected an \.pt2 file that fedkd export wrote"):
        fedkd.load_student(tmp_path / "a.pt2")


def test_the_temperature_makes_confidence_right_and_moves_no_weight(trained: RunDirectory) -> None:
    summary = trained.read_json("summary.json")
    found = summary["temperature"]
    assert (found["source"], found["images"]) == ("transfer", 20)
    assert 0.05 <= found["value"] <= 20
    assert found["calibration"]["ece"] <= summary["student"]["calibration"]["ece"]
    assert network_hash(load_student(trained)) == summary["hash"]
    assert "Scaled: logits divided by" in write_report(trained).read_text("utf-8")
