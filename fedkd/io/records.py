"""JSON files and JSON lines that a run or a study keeps, checked against a type when read.

A file that was cut, edited or mixed up is refused by its name and the key that is wrong, before a
number of it is shown. Only what readers rely on is asked for: a file of another version may hold
more.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, overload

if TYPE_CHECKING:
    from pydantic import TypeAdapter, ValidationError

Kind = TypeVar("Kind")


class Damaged(ValueError):
    """A file does not hold what fedkd wrote.

    Args:
        where: The file, and the line.
        why: What is wrong.
        remedy: What to do.
    """

    def __init__(self, where: Path | str, why: str, remedy: str = "restore it from a copy") -> None:
        super().__init__(f"{where} is damaged ({why}); {remedy}")


def refuse_link(path: Path) -> None:
    """Raise `Damaged` if a file or folder of a run is a symbolic link: it is somebody else's."""
    if path.is_symlink():
        raise Damaged(
            path,
            "a symbolic link, which is not followed here",
            "put what it points to in its place",
        )


def check_tree(path: Path) -> None:
    """Raise `Damaged` if anything below a run's folder is neither a file nor a folder.

    What comes from elsewhere may hold links to files of this machine, which would be read, written
    or deleted in their place, and pipes, which are never read to the end.
    """
    try:
        entries = list(os.scandir(path))
    except (FileNotFoundError, NotADirectoryError):  # of a live run, which replaces its files
        return
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            check_tree(Path(entry.path))
        elif entry.is_symlink():
            refuse_link(Path(entry.path))
        elif not entry.is_file(follow_symlinks=False) and Path(entry.path).exists():
            raise Damaged(entry.path, "neither a file nor a folder", "remove it")


@overload
def read_json(path: Path) -> Any: ...
@overload
def read_json(path: Path, kind: type[Kind]) -> Kind | None: ...
def read_json(path: Path, kind: Any = Any) -> Any:
    """What a JSON file holds, or None if it is not there (yet).

    Args:
        path: The file.
        kind: What it has to be, a `TypedDict` for example; keys that it lacks are kept.

    Raises:
        Damaged: it does not hold what was written, and where.
    """
    if not path.is_file():
        return None
    text = path.read_bytes()
    parsed(text, kind, path)
    return json.loads(text)


def lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """Lines of a JSON-lines file, each with its place; a last one cut short by a crash is dropped.

    Args:
        path: The file; none where there is none.
    """
    if not path.is_file():
        return
    found = path.read_bytes().split(b"\n")
    for number, line in enumerate(found, start=1):
        if number == len(found) and (not line or not _is_whole(line)):
            return
        yield f"{path}, line {number}", line


def parsed(text: bytes, kind: Any, where: Path | str) -> Any:
    """JSON text as a value of a type, a dataclass for example; fields it lacks are passed over.

    Raises:
        Damaged: it is something else, and what.
    """
    from pydantic import ValidationError  # not needed to train or distil, only to read records

    try:
        return _adapter(kind).validate_json(text, strict=True)
    except ValidationError as error:
        raise Damaged(where, _problem(error)) from None


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def _problem(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    at = ".".join(str(part) for part in first["loc"]) or "it"
    if first["type"] == "json_invalid":
        return f"not JSON: {first['ctx']['error']}"
    if first["type"] == "missing":
        return f"{at} is missing"
    return f"{at} is {_short(first['input'])}, {first['msg'].removeprefix('Input ')}"


def read_lines(path: Path, kind: type[Kind]) -> list[Kind]:
    """Records of a JSON-lines file, each checked as by `read_json`; see `lines`."""
    found = []
    for where, line in lines(path):
        parsed(line, kind, where)
        found.append(json.loads(line))
    return found


def append_line(path: Path, record: Mapping[str, Any]) -> bool:
    """Append a record to a JSON-lines file; a line that a crash cut short is dropped first.

    Returns:
        Whether one was dropped.
    """
    dropped = False
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    with os.fdopen(descriptor, "a+b") as file:
        if file.seek(0, os.SEEK_END) and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
            file.seek(0)
            content = file.read()
            whole = content.rfind(b"\n") + 1
            if _is_whole(content[whole:]):
                file.write(b"\n")
            else:
                file.truncate(whole)
                dropped = True
        text = json.dumps(record, ensure_ascii=False)
        file.write(text.encode(errors="replace") + b"\n")
    return dropped


def _short(value: Any) -> str:
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**99 else "a huge number"
    return text if len(text) <= 40 else f"{text[:40]}…"


def _is_whole(line: str | bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True
