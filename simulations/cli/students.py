"""`fedkd predict` and `fedkd export`: what a finished student is good for."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from fedkd.simulations.cli.arguments import StudentPath, Trust
from fedkd.simulations.cli.screen import screen
from fedkd.simulations.failures import USER_ERROR


def _student(path: Path, trust: bool) -> Any:
    """The run at `path`, a student of a study, or an exported one."""
    from fedkd.runs.students import load_student
    from fedkd.studies.central.folder import ROLES
    from fedkd.studies.central.training import load_trained
    from fedkd.studies.engine import kind_of

    if kind_of(path) == "distill" or any((path / f"{role}.pt").is_file() for role in ROLES):
        return load_trained(path, trust=trust)
    return load_student(path, trust=trust)


def predict(
    path: StudentPath,
    images: Annotated[list[Path], typer.Argument(help="picture files, or folders of pictures")],
    top: Annotated[int, typer.Option(help="classes shown per picture")] = 3,
    trust: Trust = False,
) -> None:
    """Name what is in pictures with a run's student; its folder is all that is needed."""
    from rich.text import Text

    from fedkd.runs.export import predict_files

    problems: list[str] = []
    answered = predict_files(_student(path, trust), images, top=top, on_error=problems.append)
    rows: list[tuple[str, list[str]]] = []
    try:
        for file, answers in answered:
            rows.append((str(file), [f"{name} {100 * p:.1f} %" for name, p in answers]))
    finally:  # whatever ends the work, what is known by then is shown
        if rows:
            table = Table(box=None, padding=(0, 2))
            table.add_column("picture", overflow="fold")
            for place in range(1, len(rows[0][1]) + 1):
                table.add_column(f"{place}.", justify="right", overflow="fold")
            for name, cells in rows:
                table.add_row(Text(name), *map(Text, cells))
            console = screen()
            # Into a file or a pipe a row is a line, however long its name.
            (console if console.is_terminal else screen(width=10_000)).print(table)
    for problem in problems:
        print(f"fedkd: {problem}", file=sys.stderr)
    if problems:
        sys.exit(USER_ERROR)


def export(
    path: StudentPath,
    format: Annotated[
        str, typer.Option(help="torch (torch.export program), onnx or safetensors")
    ] = "torch",
    output: Annotated[Path | None, typer.Option(help="file to write")] = None,
    quantise: Annotated[
        str | None, typer.Option(help="int8: 8-bit weights and activations (with --format onnx)")
    ] = None,
    max_loss: Annotated[
        float | None, typer.Option(help="points of accuracy that int8 may cost; default: 1")
    ] = None,
    trust: Trust = False,
) -> None:
    """Write the student to one file and check it against the student."""
    from fedkd.runs.export import export_student

    student = _student(path, trust)
    done = export_student(student, format, output, quantise=quantise, max_loss=max_loss)
    kind = "test images" if done.missing is None else "images of noise"
    console = screen(soft_wrap=True, highlight=False, markup=False)
    console.print(
        f"{done.path}: {done.size:,} bytes; {done.images:,} {kind} through both: "
        f"largest logit difference {done.difference:.2g}, same class on {done.agreement:.1%}"
    )
    if (before := done.unquantised) is not None:
        console.print(
            f"points of accuracy lost {done.lost:.2f}; unquantised it has {before.size:,} bytes "
            f"({_speed(before.milliseconds)})"
        )
    if done.milliseconds:
        console.print(f"{_speed(done.milliseconds)}, one thread")
    if done.missing is not None:
        console.print(f"not checked on test images: {done.missing}")


def _speed(milliseconds: Mapping[int, float]) -> str:
    each = ", ".join(f"{spent:.3g} at batch {size}" for size, spent in milliseconds.items())
    return f"ms per image: {each}"
