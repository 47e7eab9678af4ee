"""`fedkd data`: look at images of your own before they are used."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedkd.config import ConfigError
from fedkd.simulations.cli.screen import screen

if TYPE_CHECKING:
    from fedkd.data.images import ImageSet

app = typer.Typer(help="Look at images of your own.", no_args_is_help=True)

_SPLITS = ("training", "test", "validation")
_NAMED = 10  # unreadable pictures


@app.callback()
def _group() -> None:
    """Keep `check` a command of its own, though it is alone."""


@app.command("check")
def check(
    path: Annotated[
        Path, typer.Argument(help="a folder of pictures, an .npz, a .parquet, a folder of those")
    ],
    size: Annotated[int | None, typer.Option(help="height and width in pixels")] = None,
) -> None:
    """Read images as a config would: how many, of which classes and shape, and what to write."""
    from fedkd.data.datasets import load_splits
    from fedkd.simulations.cli.tables import console_table

    place = path.expanduser().resolve()
    if not place.exists():
        raise ConfigError(f"{path}: there is no such file or folder")
    name, options = _kind(place), {"path": str(place)}
    more: dict[str, Any] = {} if name == "npz" else {"skip_unreadable": True}
    if size is not None and name != "npz":
        more["size"] = size
    try:
        sets = load_splits(name, None, **options, **more)
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError(str(error)) from None
    print_ = screen().print
    print_(console_table(_table(sets, place.name)))
    train = sets[0]
    channels, height, width = train.shape
    low, high = int(train.images.min()), int(train.images.max())
    print_(f"images: {channels} x {height} x {width}, pixels from {low} to {high} of 0 to 255")
    unreadable: list[str] = []
    if name == "image_folder":
        logging.disable(logging.WARNING)  # all was said about them together
        try:
            seen, unreadable = _pictures(place)
        finally:
            logging.disable(logging.NOTSET)
        print_(f"pictures: {seen}")
    for text in unreadable[:_NAMED]:
        print_(f"cannot be read: {text}", soft_wrap=True, markup=False, highlight=False)
    if len(unreadable) > _NAMED:
        print_(f"cannot be read: {len(unreadable) - _NAMED} more")
    line = ", ".join(f"{key}: {value}" for key, value in (("name", name), ("path", place)))
    line += f", size: {train.side}" if name == "image_folder" or "size" in more else ""
    line += ", skip_unreadable: true" if unreadable else ""
    print_(f"in a config:\ndata:\n  dataset: {{{line}}}", soft_wrap=True, markup=False,
           highlight=False)  # fmt: skip


def _kind(place: Path) -> str:
    """The data set that reads it. Raises `ConfigError` for a file that none does."""
    if place.is_file():
        kinds = {".npz": "npz", ".parquet": "hf", ".arrow": "hf"}
        if place.suffix not in kinds:
            raise ConfigError(
                f"{place}: expected a file that ends with {', '.join(kinds)}, or a folder"
            )
        return kinds[place.suffix]
    saved = (place / "dataset_dict.json", place / "state.json")
    tables = (file for end in ("parquet", "arrow") for file in place.rglob(f"*.{end}"))
    if any(file.is_file() for file in saved) or next(tables, None) is not None:
        return "hf"
    return "hf" if any(place.rglob("metadata.*")) else "image_folder"


def _table(sets: tuple[ImageSet, ...], title: str) -> Any:
    from fedkd.reporting.table import Table, numbers, plain, words

    rows = []
    for part, images in zip(_SPLITS, sets):
        counts = images.class_counts() if images.labels is not None else None
        each = ["", "", ""]
        if counts is not None:
            few, many = int(counts.argmin()), int(counts.argmax())
            each = [str(int((counts > 0).sum()))]
            each += [f"{images.classes[n]}: {int(counts[n]):,}" for n in (few, many)]
        rows.append([part, f"{len(images):,}", *each])
    columns = [*words("split"), *numbers("images", "classes"), *words("fewest", "most")]
    table = plain(columns, rows)
    return Table(table.columns, table.rows, title)


def _pictures(folder: Path) -> tuple[str, list[str]]:
    """The sizes of the files as they are, and why some cannot be read."""
    from fedkd.data.pictures import SUFFIXES, read_picture

    sizes: list[tuple[int, int]] = []
    unreadable = []
    for file in sorted(folder.rglob("*")):
        inside = file.relative_to(folder).parts
        if file.suffix.lower() not in SUFFIXES or any(part.startswith(".") for part in inside):
            continue
        try:
            height, width, _ = read_picture(file, channels=3).shape
        except ValueError as error:
            unreadable.append(str(error))
        else:
            sizes.append((width, height))
    widths, heights = zip(*sizes, strict=True)
    across, down = (
        f"{min(each)}" if min(each) == max(each) else f"{min(each)} to {max(each)}"
        for each in (widths, heights)
    )
    square = sum(w == h for w, h in sizes)
    about = "all square" if square == len(sizes) else f"{square:,} of {len(sizes):,} square"
    return f"{across} pixels wide and {down} high, {about}", unreadable
