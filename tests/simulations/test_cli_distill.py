"""`fedkd distill` as a user meets it."""

import re
import signal
import sys
from pathlib import Path

import pytest
import yaml

from fedkd.studies.central.folder import StudyFolder
from fedkd.studies.central.training import Images
from simulations.cli.main import main
from tests.studies.test_central import TINY


@pytest.fixture
def fedkd(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """`fedkd("distill", ...)`: exit code, stdout and stderr, in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fedkd", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return call


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(TINY))
    return file


def test_a_study_ends_with_table_and_paths(fedkd, config: Path) -> None:
    code, out, err = fedkd("distill", config, "only=kd", "seeds=[0,1]", "recipe.epochs=1")
    assert (code, err) == (0, "")
    for word in ("teacher", "student alone", "kd", "±", "chosen on the test set", "kd, seed 1:"):
        assert word in out
    assert "vrm" not in out
    path = Path(re.search(r"^study +(\S+)$", out, re.M)[1])  # type: ignore[index]
    assert path.parent == config.parent / "runs"
    assert (path / "report.html").is_file()
    assert StudyFolder.open(path).study.recipe.epochs == 1
    (path / "report.html").unlink()
    code, out, err = fedkd("report", path)
    assert (code, err) == (0, "")
    assert "student alone" in out
    assert (path / "report.html").is_file()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["mine.yaml", "recipe.epoch=1"], "recipe.epoch: unknown key; did you mean 'epochs'?"),
        (["mine.yaml", "methods.kd.losses=[kdd]"], "did you mean 'kd'?"),
        (["configs/distill/digit.yaml"], "did you mean 'configs/distill/digits.yaml'?"),
        (["mine.yaml", "data.dataset=fashion_mnist", "data.root=/nonexistent"], "set data.root or"),
        (["mine.yaml", "--resume", "runs/x"], "give no config beside it"),
        (["--resume", "/nonexistent"], "is not the folder of a study"),
        ([], "give a config file, e.g. fedkd distill configs/distill/digits.yaml"),
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


def test_ctrl_c_keeps_the_epoch_and_says_how_to_go_on(
    fedkd, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = Images.accuracy, []

    def pressed(images: Images, network: object) -> float:
        calls.append(1)
        if len(calls) == 4:  # two epochs of the teacher, then the second of the student alone
            signal.raise_signal(signal.SIGINT)
        return original(images, network)  # type: ignore[arg-type]

    monkeypatch.setattr(Images, "accuracy", pressed)
    before = signal.getsignal(signal.SIGINT)
    code, _, err = fedkd("distill", config, "only=student", "recipe.epochs=2")
    (path,) = (config.parent / "runs").iterdir()
    assert code == 130
    assert err == f"interrupted; go on with: fedkd distill --resume {path}\n"
    assert signal.getsignal(signal.SIGINT) == before
    folder = StudyFolder.open(path)
    assert folder.student("student", 0).checkpoint.is_file()
    code, out, err = fedkd("distill", "--resume", path)
    assert (code, err) == (0, "")
    assert "student alone" in out
    assert len(calls) == 4  # what had been trained was not trained again
    assert [epoch["epoch"] for epoch in folder.student("student", 0).epochs()] == [1, 2]


def test_a_remark_about_a_foreign_checkpoint_is_shown(fedkd, config: Path) -> None:
    import torch

    from tests.studies.test_central import study

    body = Images.load(study()).network(study("student.model=resnet8").student.model, 0).body
    given = {f"x{n}": t for n, (_, t) in enumerate(body.state_dict().items())}
    torch.save({k: t for k, t in given.items() if t.ndim}, config.parent / "t.pt")
    words = ["teachers=[{model: resnet8, checkpoint: t.pt}]", "only=student", "recipe.epochs=1"]
    code, out, err = fedkd("distill", config, *words)
    assert (code, err) == (0, "")
    assert "matched by their order" in out.replace("\n", " ")
