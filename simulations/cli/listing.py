"""`fedkd list` and `fedkd show`: what there is, and one of it in full."""

from __future__ import annotations

import importlib
import inspect
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from fedkd.config import ConfigError, import_plugins
from fedkd.io.text import nearest
from fedkd.simulations.cli.screen import screen

if TYPE_CHECKING:
    from fedkd.registry import Registry

Plugins = Annotated[list[str] | None, typer.Option(help="import this module first")]


def list_things(
    what: Annotated[
        str | None, typer.Argument(help="models, losses, fusions, releases, codecs, …")
    ] = None,
    plugin: Plugins = None,
) -> None:
    """List what there is, one line each; without a word, what can be listed."""
    if what is None:
        for family in _FAMILIES:
            print(f"fedkd list {family}")
        return
    registry = _family(what, plugin, "list")
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


def show(
    what: Annotated[str, typer.Argument(help="models, losses, fusions, releases, codecs, …")],
    name: Annotated[str, typer.Argument(help="a name that `fedkd list` shows")],
    plugin: Plugins = None,
) -> None:
    """Show one loss, model, fusion rule, … in full: what it is, its options and defaults."""
    registry = _family(what, plugin, "show")
    try:
        member = registry.get(name)
    except ValueError as error:
        raise ConfigError(f"show: {error}") from None
    screen().print(Text(f"{name} ({member.__module__})", style="bold"))
    screen().print(Text(inspect.getdoc(member) or ""))
    if registry.options(name):
        screen().print(Text("\nIn a config:", style="bold"))
        screen().print(Text("- " + "\n  ".join(registry.example(name))))


# Where the registry of each family is: only the one that is asked for is imported.
_FAMILIES = {
    "models": ("fedkd.models", "MODELS"),
    "losses": ("fedkd.losses", "LOSSES"),
    "fusions": ("fedkd.fusion", "FUSIONS"),
    "releases": ("fedkd.privacy.release", "RELEASES"),
    "codecs": ("fedkd.knowledge.codecs", "CODECS"),
    "baselines": ("fedkd.simulations.baselines", "BASELINES"),
    "attacks": ("fedkd.attacks", "ATTACKS"),
    "datasets": ("fedkd.data", "DATASETS"),
    "partitions": ("fedkd.data", "PARTITIONS"),
    "samplers": ("fedkd.data", "SAMPLERS"),
    "shifts": ("fedkd.data", "SHIFTS"),
    "properties": ("fedkd.training.properties", "PROPERTIES"),
    "trackers": ("fedkd.runs.trackers", "TRACKERS"),
}
_SINGULAR = {
    "loss": "losses",
    "property": "properties",
    **{family[:-1]: family for family in _FAMILIES},
}


def _family(what: str, plugins: list[str] | None, command: str) -> Registry[Any]:
    """The registry that is meant, in the plural or the singular. Raises `ConfigError`."""
    name = _SINGULAR.get(what, what)
    if name not in _FAMILIES:
        known = list(_FAMILIES)
        raise ConfigError(f"{command}: expected one of {', '.join(known)}{nearest(what, known)}")
    import_plugins(plugins or [])
    module, registry = _FAMILIES[name]
    return getattr(importlib.import_module(module), registry)
