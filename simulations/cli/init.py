"""`fedkd init`: a folder to start from, with a ready config or a small Flower app."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Annotated

import typer

from fedkd.config import ConfigError
from fedkd.simulations.cli.configs import as_text


def init(
    folder: Annotated[Path, typer.Argument(help="the new folder, or one of yours")],
    config: Annotated[
        str, typer.Option(help="the config to copy: a name of `fedkd config list`, or a file")
    ] = "quickstart",
    flower: Annotated[
        bool, typer.Option("--flower", help="make a Flower app of it, for `flwr run`")
    ] = False,
) -> None:
    """Start a folder of your own: a ready config to change, or with --flower a Flower app."""
    text, command, file = as_text(config)
    if flower and command != "run":
        raise ConfigError(
            f"--config: {config} is a config of fedkd {command}; a Flower app runs one of fedkd run"
        )
    files = {file: text}
    if flower:
        name = _app_name(folder)
        files = _app(name, file, text)
    _write(folder, files)
    for each in files:
        print(folder / each)
    if flower:
        clients = _clients(text)
        print(
            f"next: cd {folder} && flwr run . --stream --federation-config num-supernodes={clients}"
        )
    else:
        print(f"next: cd {folder} && fedkd {command} {file}")


def _clients(text: str) -> int:
    from fedkd.config import Experiment, make_config, parse_yaml

    return make_config(Experiment, parse_yaml(text, "config"), plugins=False).clients


def _write(folder: Path, files: dict[str, str]) -> None:
    for name in files:
        if (folder / name).exists():
            raise ConfigError(f"{folder / name}: is there already; choose another folder")
    for name, text in files.items():
        place = folder / name
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(text, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{place}: cannot be written: {error.strerror}") from None


def _app_name(folder: Path) -> str:
    """The app's name: the folder's, which Flower wants plain and Python must not know."""
    name = folder.expanduser().resolve().name
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name):
        raise ConfigError(
            f"{name}: the folder gives the app its name, for which Flower takes small letters, "
            "digits and single hyphens; for example my-app"
        )
    package = name.replace("-", "_")
    if package in _LEFT_OUT or importlib.util.find_spec(package) is not None:
        raise ConfigError(
            f"{name}: a package {package!r} would hide, or be hidden by, another one; choose "
            "another name, for example my-app"
        )
    return name


# Folders that Flower leaves out of an app's bundle.
_LEFT_OUT = frozenset(["lib", "lib64", "build", "parts", "eggs", "env", "venv", "dist"])


def _app(name: str, file: str, config: str) -> dict[str, str]:
    package = name.replace("-", "_")
    fills = {"NAME": name, "PACKAGE": package, "CONFIG": file, "CLIENTS": str(_clients(config))}

    def filled(text: str) -> str:
        return re.sub("|".join(fills), lambda match: fills[match[0]], text)

    return {
        "pyproject.toml": filled(_PYPROJECT),
        "README.md": filled(_README),
        f"{package}/__init__.py": f'"""{name}: a Flower app with fedkd."""\n',
        f"{package}/server_app.py": filled(_SERVER),
        f"{package}/client_app.py": filled(_CLIENT),
        f"{package}/{file}": config,
    }


_PYPROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "NAME"
version = "1.0.0"
description = "Many private teachers, distilled into one student"
license = "Apache-2.0"
dependencies = ["fedkd[simulation]"]

[tool.hatch.build.targets.wheel]
packages = ["."]

[tool.flwr.app]
publisher = "yourname"

[tool.flwr.app.components]
serverapp = "PACKAGE.server_app:app"
clientapp = "PACKAGE.client_app:app"

[tool.flwr.app.config]
# key=value words as of `fedkd run`, separated by spaces.
overrides = ""
"""

_SERVER = '''\
"""The server fuses what the teachers answer and distils it into the student."""

import shlex
from pathlib import Path

from fedkd import load_experiment
from fedkd.simulations.grid import run_grid
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the experiment with the clients of the federation."""
    words = shlex.split(str(context.run_config["overrides"]))
    experiment = load_experiment(Path(__file__).with_name("CONFIG"), words)
    run = run_grid(experiment, grid)
    print(f"report: {run.path / 'report.html'}")
'''

_CLIENT = '''\
"""A client trains its teacher on private images and answers about the public ones."""

from fedkd.simulations.client_app import make_client_app

# Mods of Flower's or of yours: make_client_app([message_size_mod])
app = make_client_app()
'''

_README = """\
# NAME

Many private teachers, distilled into one student: a [Flower](https://flower.ai) app with fedkd.

```bash
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1   # use the environment that is active
flwr run . --stream \\
  --federation-config "num-supernodes=CLIENTS client-resources-num-cpus=1" \\
  --run-config "overrides='rounds=2 output=/absolute/path'"
```

- `PACKAGE/CONFIG` says what is run: data, teachers, student, losses. The federation has as many
  nodes as it has `clients`.
- Runs are written below `output`. It should be absolute: otherwise it starts in the folder in which
  Flower's SuperLink was started.
- Losses, models and data sets of yours: put a module into `PACKAGE/` that registers them, and name
  it in the config, `plugins: [PACKAGE.my_losses]`.
- Without Flower's command line: `fedkd run PACKAGE/CONFIG`.
"""
