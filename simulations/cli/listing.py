"""`fedkd list`: what there is."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.table import Table

from fedkd.config import ConfigError
from simulations.cli.screen import screen


def list_things(
    what: Annotated[str, typer.Argument(help="models, losses, fusions, releases, codecs, …")],
    plugin: Annotated[list[str] | None, typer.Option(help="import this module first")] = None,
) -> None:
    """List what there is, one line each."""
    from fedkd.attacks import ATTACKS
    from fedkd.config import import_plugins
    from fedkd.data import DATASETS, PARTITIONS
    from fedkd.fusion import FUSIONS
    from fedkd.io.text import nearest
    from fedkd.knowledge.codecs import CODECS
    from fedkd.losses import LOSSES
    from fedkd.models import MODELS
    from fedkd.privacy.release import RELEASES
    from fedkd.registry import Registry
    from simulations.baselines import BASELINES

    families: dict[str, Registry[Any]] = {
        "models": MODELS,
        "losses": LOSSES,
        "fusions": FUSIONS,
        "releases": RELEASES,
        "codecs": CODECS,
        "baselines": BASELINES,
        "attacks": ATTACKS,
        "datasets": DATASETS,
        "partitions": PARTITIONS,
    }
    if what not in families:
        known = list(families)
        raise ConfigError(f"list: expected one of {', '.join(known)}{nearest(what, known)}")
    import_plugins(plugin or [])
    registry = families[what]
    table = Table(box=None, padding=(0, 2), show_header=False)
    for name in registry.names():
        options = ", ".join(
            f"{key}={'…' if p.default is p.empty else p.default}"
            for key, p in registry.options(name).items()
        )
        table.add_row(f"[bold]{name}[/]", registry.summary(name), f"[dim]{options}[/]")
    if what == "models":
        table.add_row("[bold]torchvision/<name>[/]", "Any torchvision classification model.", "")
    screen().print(table)
