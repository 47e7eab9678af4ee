"""Arguments that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def a_study(example: str) -> Any:
    """The config of a study."""
    return typer.Argument(help=f"a YAML file, e.g. configs/{example}")


def keys(example: str) -> Any:
    """Overrides of a study's config."""
    return typer.Argument(help=f"key=value, e.g. {example}")


Config = Annotated[str, typer.Argument(help="a YAML file, e.g. configs/quickstart.yaml")]
Overrides = Annotated[list[str] | None, keys("rounds=5 student.model=resnet20")]
Trust = Annotated[
    bool,
    typer.Option(
        "--trust",
        help="import the plugins that the folder's config names: they run as code of yours",
    ),
]
RunPath = Annotated[Path, typer.Argument(help="a run directory")]
StudentPath = Annotated[
    Path, typer.Argument(help="a run directory, an export, or the folder of a study's student")
]
