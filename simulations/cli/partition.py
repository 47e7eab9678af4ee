"""`fedkd partition`: who holds which classes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated

import typer

from fedkd.config import ConfigError, Experiment
from fedkd.simulations.cli.arguments import Config, Overrides
from fedkd.simulations.cli.configs import load
from fedkd.simulations.cli.screen import screen


def partition(
    config: Config,
    overrides: Overrides = None,
    picture: Annotated[
        Path | None, typer.Option(help="also write a picture (png, svg, pdf)")
    ] = None,
) -> None:
    """Show who holds which classes: a table, and a picture if asked."""
    from fedkd.build import build_data, check
    from fedkd.reporting.run_figures import partition_figure
    from fedkd.simulations.cli.tables import partition_table

    if picture is not None:
        _check_picture(picture)
    experiment = load(Experiment, config, overrides or [], "partition")
    check(experiment)
    data = build_data(experiment)
    counts = data.class_counts()
    console = screen()
    console.print(partition_table(counts, data.classes, data.wrong_labels()))
    console.print(
        f"transfer set: {len(data.transfer.images):,} images, "
        f"{'labelled' if data.transfer.labelled else 'unlabelled'}, "
        f"fingerprint {data.fingerprint}; test: {len(data.test):,} images"
    )
    if picture is not None:
        try:
            with warnings.catch_warnings():  # an odd letter is a box in the picture, no more
                warnings.filterwarnings("ignore", message="Glyph .* missing")
                partition_figure(counts, data.classes).savefig(picture, dpi=150)
        except (OSError, ValueError) as error:
            raise ConfigError(f"--picture: {error}") from None
        console.print(f"picture: {picture}", soft_wrap=True, markup=False)


def _check_picture(file: Path) -> None:
    """Refuse a file that cannot be written, before the work: matplotlib adds endings silently."""
    if file.suffix.lower() not in (endings := (".png", ".svg", ".pdf", ".jpg", ".webp")):
        raise ConfigError(f"--picture: {file}: expected a file that ends with {', '.join(endings)}")
    if not file.parent.is_dir():
        raise ConfigError(f"--picture: {file}: there is no folder {file.parent}")
    if file.is_dir():
        raise ConfigError(f"--picture: {file}: is a folder")
