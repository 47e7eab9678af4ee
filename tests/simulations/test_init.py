"""`fedkd init`: folders to start from."""

import tomllib
from pathlib import Path

import pytest

from fedkd.config import load_experiment, read_config
from tests.simulations.conftest import Fedkd


def test_a_ready_config_is_copied_with_its_comments_and_nothing_is_overwritten(
    fedkd: Fedkd, tmp_path: Path
) -> None:
    code, out, _ = fedkd("init", "mine")
    assert code == 0
    assert "next: cd mine && fedkd run quickstart.yaml" in out
    copy = tmp_path / "mine" / "quickstart.yaml"
    assert "# a mirrored digit is none" in copy.read_text()
    assert fedkd("init", "mine")[0::2] == (
        2,
        "fedkd: mine/quickstart.yaml: is there already; choose another folder\n",
    )


@pytest.mark.parametrize("config", ["come_and_go", "configs/compare/quickstart.yaml"])
def test_what_a_config_takes_from_its_base_is_written_out(
    fedkd: Fedkd, tmp_path: Path, config: str
) -> None:
    assert fedkd("init", "mine", "--config", config)[0] == 0
    (copy,) = (tmp_path / "mine").iterdir()
    assert copy.read_text().startswith("# ")
    assert "base:" not in copy.read_text()
    ready = config if config.endswith(".yaml") else f"configs/{config}.yaml"
    assert read_config(copy) == read_config(ready)


def test_a_flower_app_is_made(fedkd: Fedkd, tmp_path: Path) -> None:
    code, out, _ = fedkd("init", "my-app", "--flower")
    assert code == 0
    assert "flwr run . --stream --federation-config num-supernodes=8" in out
    app = tmp_path / "my-app"
    project = tomllib.loads((app / "pyproject.toml").read_text())
    components = project["tool"]["flwr"]["app"]["components"]
    for component in components.values():
        module, _, name = component.partition(":")
        code = (app / f"{module.replace('.', '/')}.py").read_text()
        compile(code, module, "exec")
        assert f"{name} = " in code
        assert len(code.splitlines()) < 25
    assert load_experiment(app / "my_app" / "quickstart.yaml").clients == 8


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["torch", "--flower"], "a package 'torch' would hide"),
        (["build", "--flower"], "a package 'build' would hide"),
        (["my_app", "--flower"], "small letters, digits and single hyphens"),
        (["app-1", "--flower", "--config", "compare/quickstart"], "a config of fedkd compare"),
        (["mine", "--config", "quikstart"], "did you mean 'configs/quickstart.yaml'?"),
    ],
)
def test_what_cannot_be_made_is_refused(fedkd: Fedkd, words: list[str], reason: str) -> None:
    code, _, error = fedkd("init", *words)
    assert code == 2
    assert reason in error
