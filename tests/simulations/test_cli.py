"""The command line as a user meets it: exit codes, one-line errors, what is printed and left.

A process of its own takes seconds to start, so it has one where the process is what is tested.
"""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from fedkd import configs
from fedkd.runs.directory import RunDirectory
from fedkd.simulations.local import run_local
from tests.conftest import Tiny
from tests.simulations.conftest import Fedkd

PAGES = True
ROOT = Path(__file__).parents[2]


COMMAND = (sys.executable, "-m", "fedkd.simulations.cli.main")


def process(*words: object) -> tuple[int, str, str]:
    """As `fedkd`, in a process of its own."""
    done = subprocess.run(
        [*COMMAND, *map(str, words)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    from fedkd.config import make_experiment
    from tests.conftest import TINY

    parent = tmp_path_factory.mktemp("cli")
    return run_local(make_experiment(TINY, [f"output={parent}", "rounds=1"]))


@pytest.mark.smoke
@pytest.mark.parametrize(
    "words",
    [
        ["run", "configs/quickstart.yaml", "rouns=3"],
        ["run", "configs/quickstart.yaml", "data.dataset=digts"],
        ["run", "configs/quickstrat.yaml"],
        ["run", "configs/quickstart.yaml", "rounds"],
        ["run", "configs/quickstart.yaml", "clients=4000"],
        ["run", "configs/fashion_mnist.yaml", "data.root=/nonexistent"],
        ["run", "configs/quickstart.yaml", "--runner", "spark"],
        ["run", "--resume", "/nonexistent"],
        ["config", "show", "configs/quickstart.yaml", "student.modl=3"],
        ["partition", "configs/quickstart.yaml", "data.partition.alpha=x"],
        ["list", "modles"],
        ["predict", "/nonexistent", "x.png"],
    ],
    ids=" ".join,
)
def test_what_the_user_got_wrong_is_one_line_and_exit_code_2(
    words: list[str], fedkd: Fedkd
) -> None:
    _is_one_line(*fedkd(*words))


def test_a_process_ends_with_that_line_and_code() -> None:
    _is_one_line(*process("run", "configs/quickstart.yaml", "rouns=3"))


def _is_one_line(code: int, out: str, err: str) -> None:
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("fedkd: ")


def test_run_ends_with_table_and_paths(tiny: Tiny, tmp_path: Path) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text(tiny("rounds=1").to_yaml())
    code, out, err = process("run", config, "--runner", "local", "distillation.epochs=1")
    assert (code, err) == (0, "")
    measured = ("student", "best teacher", "ensemble", "oracle", "ceiling", "worst client")
    for word in (*measured, "knowledge"):
        assert word in out
    path = Path(re.search(r"^run\s+(\S+)$", out, re.M)[1])
    assert (path / "report.html").is_file()
    assert RunDirectory.open(path).experiment.distillation.epochs == 1


def test_ctrl_c_ends_in_good_order_and_the_run_goes_on(
    tiny: Tiny, tmp_path: Path, fedkd: Fedkd
) -> None:
    config = tmp_path / "mine.yaml"
    few = ("teachers.models=[mlp]", "fusion=[entropy]", "evaluation.baselines=[]")
    config.write_text(tiny("rounds=3", "distillation.epochs=12", *few).to_yaml())
    begun = subprocess.Popen(
        [*COMMAND, "run", str(config), "--runner", "local"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("runs/*/checkpoints/*.pt")) and time.monotonic() < deadline:
        time.sleep(0.05)
    begun.send_signal(signal.SIGINT)
    _, stderr = begun.communicate(timeout=60)
    assert begun.returncode == 130
    (path,) = (tmp_path / "runs").iterdir()
    assert stderr == f"interrupted; go on with: fedkd run --resume {path}\n"
    code, _, stderr = fedkd("run", "--resume", path, "--runner", "local")
    assert code == 0, stderr
    whole = run_local(RunDirectory.open(path).experiment)
    ours, theirs = (run.read_json("summary.json") for run in (RunDirectory.open(path), whole))
    assert ours["hash"] == theirs["hash"]


def test_help_and_reading_a_config_wait_for_no_torch() -> None:
    program = """
import sys
import fedkd.simulations.cli.main
from fedkd.config import make_experiment
make_experiment({"student": "mlp"})
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.smoke
@pytest.mark.parametrize("module", ["typer", "torch"])
def test_ctrl_c_while_still_importing_is_one_line(module: str) -> None:
    program = f"""
import os, signal, sys

class Interrupting:
    def find_spec(self, name, path, target=None):
        if name == "{module}":
            os.kill(os.getpid(), signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
sys.meta_path.insert(0, Interrupting())
from fedkd.simulations.cli.start import main
sys.argv = ["fedkd", "list", "losses"]
main()
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr, done.stdout) == (130, "fedkd: interrupted\n", "")


def test_config_show_prints_every_default(fedkd: Fedkd) -> None:
    _, out, _ = fedkd("config", "show", "configs/quickstart.yaml", "rounds=5")
    shown = yaml.safe_load(out)
    assert shown["rounds"] == 5
    assert shown["federation"]["quorum"] == 0.5


def test_partition_shows_table_and_picture(tmp_path: Path, fedkd: Fedkd) -> None:
    picture = tmp_path / "who.png"
    code, out, _ = fedkd("partition", "configs/quickstart.yaml", "--picture", picture)
    assert code == 0
    assert "transfer set: 400 images, unlabelled" in out
    assert Image.open(picture).size[0] > 400


def test_list_has_a_line_for_each(fedkd: Fedkd) -> None:
    for what, expected in (
        ("models", "resnet20"), ("losses", "vrm"), ("fusions", "class_gated"),
        ("datasets", "fashion_mnist"), ("partitions", "dirichlet"),
    ):  # fmt: skip
        code, out, _ = fedkd("list", what)
        assert code == 0
        assert expected in out


@pytest.mark.parametrize("family", ["loss", "losses"])
def test_show_tells_what_a_config_may_set(family: str, fedkd: Fedkd) -> None:
    _, shown, _ = fedkd("show", family, "dkd")
    assert "Decoupled Knowledge Distillation" in shown
    assert "- name: dkd\n  alpha: 1.0" in shown


def test_every_ready_config_is_listed_with_a_command_that_takes_it(fedkd: Fedkd) -> None:
    _, out, _ = fedkd("config", "list")
    lines = [line for line in out.splitlines() if line[:1] != " "]
    kinds = {line.split("configs/")[1]: line.split(" configs/")[0] for line in lines}
    assert kinds["quickstart.yaml"] == "fedkd run"
    assert kinds["privacy/digits.yaml"] == "fedkd privacy sweep"
    assert kinds["distill/cifar100/vgg13_vgg8.yaml"] == "fedkd distill"  # by what it is based on
    folder = Path(configs.__file__).parent
    assert len(kinds) == len([f for f in folder.rglob("*.yaml") if f.name[0] != "_"])


def test_a_shell_can_complete(monkeypatch: pytest.MonkeyPatch, fedkd: Fedkd) -> None:
    for name, value in (
        ("_FEDKD_COMPLETE", "bash_complete"), ("COMP_WORDS", "fedkd dist"), ("COMP_CWORD", "1"),
    ):  # fmt: skip
        monkeypatch.setenv(name, value)
    assert fedkd()[1] == "plain,distill\n"


def test_help_has_groups_and_a_short_option(fedkd: Fedkd) -> None:
    _, shown, _ = fedkd("-h")
    assert shown.index("Run an experiment") < shown.index("Examine a run")
    assert "key=value" in fedkd("run", "-h")[1]


def test_report_predict_and_export(finished: RunDirectory, tmp_path: Path, fedkd: Fedkd) -> None:
    (finished.path / "report.html").unlink()
    assert fedkd("report", finished.path)[0] == 0
    assert (finished.path / "report.html").is_file()

    picture = tmp_path / "picture.png"
    noise = np.random.default_rng(0).integers(0, 255, (30, 20, 3), dtype=np.uint8)
    Image.fromarray(noise).save(picture)
    code, out, err = fedkd("predict", finished.path, picture)
    assert code == 0, err
    assert "pattern" in out
    (tmp_path / "text.png").write_text("not an image")
    code, out, err = fedkd("predict", finished.path, tmp_path / "no.png", tmp_path, "--top", 9)
    assert code == 2
    assert [line.split()[0] for line in out.splitlines()[1:]] == [str(picture)]
    assert [line.split(": ")[1] for line in err.splitlines()] == [
        str(tmp_path / name) for name in ("no.png", "text.png")
    ]

    for format, suffix in (("torch", "pt2"), ("onnx", "onnx")):
        code, out, err = fedkd("export", finished.path, "--format", format)
        assert code == 0, err
        assert "same class on 100.0%" in out.replace("\n", " ")
        assert (finished.path / f"student.{suffix}").stat().st_size > 1000
    assert fedkd("export", finished.path, "--format", "tflite")[0] == 2
