"""The start scripts, run by sh with Flower's commands replaced by ones that write down."""

import json
import os
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from flwr.common.config import parse_config_args

from fedkd.config import ConfigError
from fedkd.simulations.deploy import scripts
from fedkd.simulations.deploy.folder import read_settings
from fedkd.simulations.deploy.plan import Plan

HOSTILE = [
    "/d/$(touch X)", "/d/`touch X`", "/d/a b", "/d/o'brien", '/d/"q"', "/d/a\nb", "/d/\\", "/d/é",
    "/d/;touch X;", "/d/'\"$(touch X)\"'", "/d/#x", "/d/$HOME", "/d/*", "~/x", "/d/a=b",
]  # fmt: skip
FOLDERS = ["plain", "$(touch X)", 'o\'brien "q"', "a\nb", "back\\slash;touch X"]
FAKE = f"""#!{sys.executable}
import json, os, sys
from pathlib import Path
name = Path(sys.argv[0]).name
with Path(os.environ["WRITTEN"]).open("a") as file:
    print(json.dumps([name, sys.argv[1:], dict(os.environ)]), file=file)
if name == "flwr.sh":
    print('{{"run-id": 7}}' if sys.argv[1] == "run" else
          '{{"runs": [{{"run-id": 7, "status": "finished:completed"}}]}}' if sys.argv[1] == "ls"
          else "")
sys.exit(int(os.environ.get("CODE", "0")))
"""
Run = Callable[..., list[tuple[str, list[str], dict[str, str]]]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run a script of a folder; what the commands it called were given."""
    commands = tmp_path / "bin"
    commands.mkdir()

    def fake(path: Path) -> None:
        path.write_text(FAKE)
        path.chmod(0o700)

    for name in ("flwr", "flower-superlink", "fedkd"):
        fake(commands / name)

    def start(
        folder: Path, script: str, *words: str, code: int = 0, **env: str
    ) -> list[tuple[str, list[str], dict[str, str]]]:
        if script == scripts.RUN:
            fake(folder / "flwr.sh")
        (folder / "script.sh").write_text(script)
        written = tmp_path / "written"
        path = f"{commands}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            ["sh", str(folder / "script.sh"), *words],
            env={**os.environ, "PATH": path, "WRITTEN": str(written), "CODE": str(code), **env},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert done.returncode == code, done.stderr
        assert not list(tmp_path.rglob("X")), "something in a name was run"
        return [tuple(json.loads(line)) for line in written.read_text().splitlines()]

    return start


def machine(tmp_path: Path, name: str, settings: str) -> Path:
    folder = tmp_path / name
    folder.mkdir()
    (folder / "settings.env").write_text(settings)
    return folder


@pytest.mark.parametrize("value", HOSTILE)
def test_settings_mean_to_sh_what_init_was_given(tmp_path: Path, value: str) -> None:
    plan = Plan(3, ("localhost",), data=value, source=Path(value))
    for text, name in (
        (scripts.server_settings(plan), "FEDKD_SOURCE"),
        (scripts.server_settings(plan), "DATA_ROOT"),
        (scripts.node_settings(plan, 1, "f" * 64), "DATA_ROOT"),
    ):
        path = tmp_path / "settings.env"
        path.write_text(text)
        script = f'set -eu; . ./settings.env; printf %s "${name}"'
        done = subprocess.run(["sh", "-c", script], cwd=tmp_path, capture_output=True, check=True)
        assert done.stdout.decode() == str(Path(value) if name == "FEDKD_SOURCE" else value)
        assert read_settings(path)[name] == done.stdout.decode()
        assert [p.name for p in tmp_path.iterdir()] == ["settings.env"]


def test_settings_that_no_shell_reads_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "settings.env").write_text("DATA='open\n")
    with pytest.raises(ConfigError, match=r"settings\.env: expected lines KEY=value"):
        read_settings(tmp_path / "settings.env")


@pytest.mark.parametrize("name", FOLDERS)
def test_overrides_reach_the_server_as_they_were_written(
    tmp_path: Path, run: Run, name: str
) -> None:
    source = tmp_path / f"source {name}"
    source.mkdir()
    (source / "pyproject.toml").touch()
    settings = scripts.server_settings(Plan(3, ("localhost",), source=source))
    folder = machine(tmp_path, name, settings)
    words = [
        "name=o'brien", "data.dataset={name: 'x', path: \"a b\"}", "note=$(touch X)", "rounds=3",
        "a=`touch X`", "b=\\", "c=a\nb", "d='", 'e="', "f=", "g=a=b", "h=é",
    ]  # fmt: skip
    first, *_ = run(folder, scripts.RUN, *words)
    assert first[1][:3] == ["run", str(source), "remote"]
    config = parse_config_args([first[1][first[1].index("--run-config") + 1]])
    assert shlex.split(config.pop("overrides")) == words
    assert config == {
        "config": f"{folder}/experiment.yaml", "output": f"{folder}/runs",
        "keys": f"{folder}/nodes",
    }  # fmt: skip


def test_a_resumed_run_has_its_folder_and_the_keys(tmp_path: Path, run: Run) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "pyproject.toml").touch()
    settings = scripts.server_settings(Plan(3, ("localhost",), source=Path("/nowhere")))
    folder = machine(tmp_path, "link", settings)
    resumed = tmp_path / "o'brien $(touch X)"
    resumed.mkdir()
    # What the environment says about the checkout goes before the file.
    first, *_ = run(folder, scripts.RUN, "--resume", resumed.name, FEDKD_SOURCE=str(source))
    assert first[1][1] == str(source)
    config = parse_config_args([first[1][first[1].index("--run-config") + 1]])
    assert config == {"resume": str(resumed), "keys": f"{folder}/nodes"}


@pytest.mark.parametrize("name", FOLDERS)
def test_flowers_command_line_reaches_the_superlink_by_the_loopback(
    tmp_path: Path, run: Run, name: str
) -> None:
    plan = Plan(3, ("fedkd.example.org",), listen="0.0.0.0")
    folder = machine(tmp_path, name, scripts.server_settings(plan))
    ((command, words, env),) = run(folder, scripts.FLWR, "ls", "a b")
    assert (command, words) == ("flwr", ["ls", "a b"])
    config = tomllib.loads((Path(env["FLWR_HOME"]) / "config.toml").read_text())
    assert config["superlink"] == {
        "default": "remote",
        "remote": {"address": "127.0.0.1:8444", "root-certificates": f"{folder}/ca.crt"},
    }


@pytest.mark.parametrize(("words", "listen"), [([], "127.0.0.1"), (["0.0.0.0"], "0.0.0.0")])
def test_the_superlink_stays_on_the_loopback_and_the_gate_listens(
    tmp_path: Path, run: Run, words: list[str], listen: str
) -> None:
    settings = scripts.server_settings(Plan(3, ("fedkd.example.org",)))
    folder = machine(tmp_path, "link", settings)
    script = scripts.SUPERLINK.replace("exec flower-superlink", "wait; exec flower-superlink")
    gate, link = run(folder, script, *words)
    assert (gate[0], gate[1]) == ("fedkd", ["deploy", "gate", "."])
    assert (gate[2]["LISTEN"], gate[2]["PORT"]) == (listen, "8443")
    assert link[0] == "flower-superlink"
    assert link[1][:4] == ["--host", "127.0.0.1", "--port", "8444"]
    assert "--enable-supernode-auth" in link[1]


@pytest.mark.parametrize("code", [0, 2])
def test_a_supernode_gets_its_settings_and_stops_at_one_that_is_wrong(
    tmp_path: Path, run: Run, code: int
) -> None:
    plan = Plan(3, ("localhost",), data="/d/$(touch X)")
    folder = machine(tmp_path, "o'brien", scripts.node_settings(plan, 1, "f" * 64))
    ((command, words, env),) = run(folder, scripts.SUPERNODE, code=code)
    assert (command, words) == ("fedkd", ["deploy", "supernode", "."])
    given = {name: env[name] for name in ("PARTITION_ID", "APPS", "DATA_ROOT", "POLICY", "KEY")}
    assert given == {
        "PARTITION_ID": "1", "APPS": "f" * 64, "DATA_ROOT": "/d/$(touch X)",
        "POLICY": "policy.yaml", "KEY": "node.key",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"port": 0}, "--port"), ({"port": 70000}, "--port"), ({"listen": "all"}, "--listen"),
        ({"listen": "$(id)"}, "--listen"), ({"listen": ""}, "--listen"),
    ],
)  # fmt: skip
def test_where_the_server_listens_is_checked(words: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Plan(2, ("localhost",), **words)


def test_the_two_ports_differ() -> None:
    ports = [Plan(2, ("localhost",), port).control_port for port in (1, 8443, 65535)]
    assert ports == [2, 8444, 65534]
