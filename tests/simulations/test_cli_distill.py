"""`fedkd distill` as a user meets it."""

import signal
from pathlib import Path

import pytest
import yaml

from fedkd.studies.central.folder import Place
from fedkd.studies.central.training import Images
from tests.studies.test_central import TINY


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(TINY))
    return file


def test_a_study_ends_with_its_table(fedkd, config: Path) -> None:
    once = ("experiment.teachers.epochs=1", "experiment.distillation.epochs=1")
    code, out, err = fedkd("distill", config, "only=kd", "seeds=[0,1]", *once)
    assert (code, err) == (0, "")
    for word in ("teacher", "student alone", "kd", "±", "chosen on the test set", "kd, seed 1:"):
        assert word in out
    assert out.count("kd, seed 1:") == 1
    assert "vrm" not in out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["mine.yaml", "methods.kd=[kdd]"], "did you mean 'kd'?"),
        (["configs/distill/digit.yaml"], "did you mean 'configs/distill/digits.yaml'?"),
        (
            ["mine.yaml", "experiment.data={dataset: fashion_mnist, root: /nonexistent}"],
            "set data.root or",
        ),
    ],
)
def test_what_the_user_got_wrong_is_one_line_and_no_folder(
    fedkd, config: Path, words: list[str], expected: str
) -> None:
    code, out, err = fedkd("distill", *words)
    assert (code, out) == (2, "")
    assert err.startswith("fedkd: ")
    assert err.count("\n") == 1
    assert expected in err
    assert not (config.parent / "runs").exists()


@pytest.mark.parametrize(
    ("number", "ending", "word"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 75, "stopped")],
)
def test_ctrl_c_and_a_batch_system_keep_the_epoch_and_are_told_how_to_go_on(
    fedkd,
    config: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    ending: int,
    word: str,
) -> None:
    original, calls = Images.accuracy, []

    def pressed(images: Images, network: object, **more: object) -> float:
        calls.append(1)
        if len(calls) == 4:  # two epochs of the teacher, then the second of the student alone
            signal.raise_signal(number)
        return original(images, network, **more)

    monkeypatch.setattr(Images, "accuracy", pressed)
    before = signal.getsignal(number)
    code, _, err = fedkd("distill", config, "only=student")
    (path,) = (config.parent / "runs").iterdir()
    assert code == ending
    assert err == f"{word}; go on with: fedkd distill --resume {path}\n"
    assert signal.getsignal(number) == before
    place = Place.of_student(path, "student", 0)
    assert place.checkpoint.is_file()
    code, out, err = fedkd("distill", "--resume", path)
    assert (code, err) == (0, "")
    assert "student alone" in out
    assert len(calls) == 4  # what had been trained was not trained again
    assert [epoch["epoch"] for epoch in place.epochs()] == [1, 2]


def test_a_remark_about_a_foreign_checkpoint_is_shown(fedkd, config: Path) -> None:
    import torch

    from tests.studies.test_central import study

    given = study("student.model=resnet8").config.experiment
    body = Images.load(given).network(given.student.model, 0).body
    given = {f"x{n}": t for n, (_, t) in enumerate(body.state_dict().items())}
    torch.save({k: t for k, t in given.items() if t.ndim}, config.parent / "t.pt")
    teachers = "experiment.teachers={models: resnet8, checkpoints: [t.pt]}"
    code, out, err = fedkd("distill", config, teachers, "only=student")
    assert (code, err) == (0, "")
    assert "matched by their order" in out.replace("\n", " ")
