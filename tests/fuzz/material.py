"""Good inputs, made once: configs, a picture, and the folders that each command leaves."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from tests.fuzz.engine import Command

FEDERATION: dict[str, Any] = {
    "name": "mini",
    "rounds": 1,
    "clients": 2,
    "data": {
        "dataset": {"name": "synthetic", "classes": 3, "size": 8, "per_class": 20},
        "partition": "iid",
        "transfer": {"size": 12},
        "test": 9,
    },
    "teachers": {"models": [{"name": "mlp", "hidden": 8}], "epochs": 1},
    "student": {"model": {"name": "mlp", "hidden": 8}},
    "fusion": ["entropy"],
    "distillation": {"losses": ["kd"], "epochs": 1},
    "output": "runs",
}
_PRIVACY = {"nominal_size": 16, "delta": 1e-3, "epsilon": 50, "accountant": "rdp"}
STUDY: dict[str, Any] = {
    "study": "distill",
    "name": "study",
    "experiment": {
        "data": {"dataset": {"name": "synthetic", "classes": 3, "size": 8, "per_class": 15}},
        "teachers": {"models": [{"name": "mlp", "hidden": 8}], "epochs": 1},
        "student": {"model": {"name": "mlp", "hidden": 8}},
        "distillation": {"epochs": 1},
    },
    "methods": {"kd": ["kd"]},
    "seeds": [0],
    "output": "runs",
}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "run": ("run", FEDERATION),
    "private": (
        "run",
        {
            **FEDERATION,
            "teachers": {**FEDERATION["teachers"], "privacy": _PRIVACY},
            "evaluation": {"clients": False, "baselines": []},
        },
    ),
    "study": ("distill", STUDY),
    "comparison": ("compare", {"experiment": FEDERATION, "methods": ["fedkd", "local_only"]}),
    "ablation": ("ablate", {"experiment": FEDERATION, "grid": {"fusion": ["uniform"]}}),
    "sweep": (
        "privacy sweep",
        {
            "experiment": FEDERATION,
            "epsilons": ["inf"],
            "mechanisms": {
                "dp_sgd": {
                    "teachers.privacy": {"nominal_size": 16, "delta": 1e-3, "accountant": "rdp"}
                }
            },
        },
    ),
    "attack": (
        "attack",
        {"experiment": FEDERATION, "rules": ["class_gated"], "attacks": ["collude"]},
    ),
}


class Material:
    """Good inputs below a folder; what a command leaves is made when it is first asked for.

    Attributes:
        configs: Name -> its YAML file.
        picture: A readable picture in the size of the tiny federation.
    """

    def __init__(self, command: Command, home: Path) -> None:
        home.mkdir(parents=True, exist_ok=True)
        self.configs = {name: home / f"{name}.yaml" for name in CONFIGS}
        for name, (_, values) in CONFIGS.items():
            self.configs[name].write_text(yaml.safe_dump(values, sort_keys=False))
        self.picture = home / "picture.png"
        Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(self.picture)
        self._command, self._home = command, home
        self._folders: dict[str, Path] = {}

    def folder(self, name: str) -> Path:
        """What the command left for the config `name`; `node`: a folder of fedkd deploy."""
        if name not in self._folders:
            self._folders[name] = self._node() if name == "node" else self._left(name)
        return self._folders[name]

    def _left(self, name: str) -> Path:
        words = [*CONFIGS[name][0].split(), self.configs[name].name]
        out = good(self._command, words, self._home)
        found = Path(re.findall(r"^(?:run|study|folder|report) +(\S+)$", out, re.M)[0])
        return found if found.is_dir() else found.parent

    def _node(self) -> Path:
        words = ["deploy", "init", "deployment", "--nodes", "2", "--host", "localhost"]
        words += ["--own-data", "--deal", "--config", self.configs["run"].name]
        good(self._command, words, self._home)
        return self._home / "deployment" / "node-0"


def good(command: Command, words: list[str], home: Path) -> str:
    """What a command says that has to succeed."""
    done = command(words, home)
    assert done.code == 0, (words, done)
    return done.out
