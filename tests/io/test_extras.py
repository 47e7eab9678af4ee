"""What `pip install fedkd` alone gives, and how a missing extra is named."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from fedkd.io.extras import MissingExtra, extra
from fedkd.simulations.failures import failure_of

ROOT = Path(__file__).parents[2]
EXTRAS = ("simulation", "report", "privacy", "deploy", "onnx")

# What an environment without the extras is like: their modules cannot be found.
_BARE = """\
import sys
class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        absent = name.split(".")[0] in {absent!r}
        return None if absent else self.finder.find_spec(name, path, target)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""


PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def _absent() -> set[str]:
    """Import names of everything that only an extra brings."""
    optional = PROJECT["optional-dependencies"]
    wanted = [re.split(r"[\[<>=]", word)[0] for name in EXTRAS for word in optional[name]]
    return {word.replace("-", "_") for word in wanted if word != "fedkd"} | {"ray"}


def _bare(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    program = _BARE.format(absent=_absent()) + code
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def _blocks(page: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def test_the_library_needs_no_extra(tmp_path: Path) -> None:
    done = _bare(
        """
import importlib, pkgutil, fedkd
for name in fedkd.__all__:
    getattr(fedkd, name)
rooms = ("losses", "fusion", "models", "functional", "knowledge", "data", "training")
for room in (*rooms, "distillation", "config", "privacy", "rounds", "runs"):
    package = importlib.import_module(f"fedkd.{room}")
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        importlib.import_module(module.name)
train, test = fedkd.load_dataset("digits")
data = fedkd.federate(train, test, clients=3, partition="dirichlet", transfer_size=100, seed=0)
shards = [data.shard(client) for client in range(3)]
teachers = [fedkd.network("mlp", data.transfer.images, seed=client) for client in range(3)]
student = fedkd.train_student("mlp", teachers, data.transfer.images, shards=shards, epochs=1)
fedkd.evaluate(student, data.test)
""",
        tmp_path,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/api.md"])
def test_the_documented_python_needs_no_extra(page: str, tmp_path: Path) -> None:
    """Up to the block that runs a federation."""
    blocks = _blocks(page)
    alone = next((n for n, code in enumerate(blocks) if "simulations" in code), len(blocks))
    assert alone > 0
    program = ["import sys; sys.path.insert(0, '')"]
    for code in blocks[:alone]:
        if named := re.match(r"# (\w+\.py)\n", code):  # the block is that file
            (tmp_path / named[1]).write_text(code)
        else:
            program.append(code)
    done = _bare("\n".join(program), tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("from fedkd.simulations.cli.start import main; main()", "fedkd command needs click.*ion"),
        (
            "import fedkd.simulations.local",
            "simulations.local needs flwr: .*fedkd.simulation",
        ),
        ("import fedkd.simulations.ray", "fedkd.simulations.ray needs flwr: .*fedkd.simulation"),
        ("import fedkd.simulations.deploy.keys", "needs cryptography: .*fedkd.deploy"),
        ("import fedkd.reporting.page", "needs jinja2: pip install 'fedkd.report.'"),
        ("from fedkd.privacy.noise import *; SecureGenerator()", "cryptography: .*fedkd.privacy"),
    ],
)
def test_a_missing_extra_is_named_in_the_last_line(
    code: str, expected: str, tmp_path: Path
) -> None:
    done = _bare(code, tmp_path)
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert re.search(expected, lines[-1]), done.stderr
    assert "main()" not in code or len(lines) == 1


def test_a_command_that_needs_another_extra_ends_with_that_line() -> None:
    with pytest.raises(MissingExtra) as caught, extra("privacy", "DP-SGD"):
        import no_such_library  # noqa: F401
    failure = failure_of(caught.value)
    assert failure.text == "DP-SGD needs no_such_library: pip install 'fedkd[privacy]'"
    assert failure.code == 2


def test_all_is_all_extras_and_the_tests_need_them() -> None:
    extras = PROJECT["optional-dependencies"]
    assert extras["all"] == ["fedkd[simulation,privacy,report,deploy,onnx,peft,foundation,hf]"]
    assert "fedkd[all]" in extras["test"]
