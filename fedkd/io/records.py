"""What a run, a study or a comparison writes down, and the shape that is asked of it when read.

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
from typing import Any

from pydantic import TypeAdapter, ValidationError

NUMBER = (int, float)
MAYBE = (int, float, None)

_SCORE = {
    "accuracy": NUMBER,
    "per_class?": [MAYBE],
    "calibration?": (
        None,
        {"ece": NUMBER, "confidence": [MAYBE], "accuracy": [MAYBE], "counts": [NUMBER]},
    ),
}

_REFUSED = {"round": (int, None), "phase": str, "client": (int, None), "reason": str}
_TEACHER = {
    "client": int,
    "model": str,
    "examples": (int, None),
    "accuracy": MAYBE,
    "student_on_holdout": MAYBE,
}
_PRIVACY = {
    "mechanism": str,
    "worst": NUMBER,
    "budget": MAYBE,
    "delta": MAYBE,
    "clients?": {str: {"epsilon": MAYBE}},
}
#: A run's summary.json.
SUMMARY = {
    "name": str,
    "seed": int,
    "classes": [str],
    "class_counts?": [[int]],
    "transfer": {"size": int, "bytes": NUMBER},
    "student": {
        **_SCORE,
        "model": str,
        "parameters": int,
        "best_accuracy": NUMBER,
        "best_round": int,
    },
    "teachers": [_TEACHER],
    "ensemble?": (None, _SCORE),
    "oracle?": MAYBE,
    "ceiling?": MAYBE,
    "worst_client?": MAYBE,
    "degraded_rounds": [int],
    "refused": [_REFUSED],
    "privacy?": (None, _PRIVACY),
    "bytes": {str: {"down": NUMBER, "up": NUMBER}},
    "seconds": {str: NUMBER},
}
#: results.json of one training of a study, and a line of its metrics.jsonl.
TRAINING = {
    "model": str,
    "parameters": int,
    "last": NUMBER,
    "best": NUMBER,
    "seconds?": MAYBE,
    "images_per_second?": MAYBE,
    "seed?": int,
}
EPOCH = {
    "epoch": int,
    "loss": NUMBER,
    "terms": {str: NUMBER},
    "accuracy": MAYBE,
    "gradients": {str: NUMBER},
}
#: What came of a row and seed of a comparison: numbers, or the error.
ROW = (
    {"error": str, "settings": dict},
    {
        "settings": dict,
        "classes": [str],
        "per_class": [MAYBE],
        "has_student": bool,
        "rounds": [
            {
                "round": int,
                "accuracy": MAYBE,
                "ece": MAYBE,
                "up": MAYBE,
                "down": MAYBE,
                "seconds": MAYBE,
            }
        ],
        **{
            f"{key}?": MAYBE
            for key in (
                "final", "best", "best_round", "worst_client", "ece", "up", "down", "transfer",
                "seconds", "teachers", "spent",
            )
        },
    },
)  # fmt: skip
#: What came of one attack on one rule: numbers, or why the rule cannot be used.
CELL = (
    {"problem": str},
    {"accuracy": NUMBER, "per_class?": (None, [MAYBE]), "refused": {str: int}},
)
#: What a client's folder says of its teacher.
TEACHER = {
    "client": int,
    "num_examples": (int, None),
    "class_counts": (None, [int]),
    "parameters": (int, None),
}
LINEAGE = {"source": str, "without": [int], "mode": str}

SHAPES: Mapping[str, Any] = {
    "summary.json": SUMMARY,
    "versions.json": {str: str},
    "lineage.json": LINEAGE,
    "privacy.json": _PRIVACY,
    "saved.json": {str: NUMBER},
}


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


def read_json(path: Path, shape: Any = None) -> Any:
    """What a JSON file holds, or None if it is not there (yet).

    Args:
        path: The file.
        shape: What it has to look like (`mismatch`); None: anything.

    Raises:
        Damaged: it does not hold what was written, and where.
    """
    if not path.is_file():
        return None
    value = _parsed(_text(path), str(path))
    _check(value, shape, str(path))
    return value


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
    try:
        return _adapter(kind).validate_json(text, strict=True)
    except ValidationError as error:
        raise Damaged(where, _problem(error)) from None


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _problem(error: ValidationError) -> str:
    """What is wrong with a value, in a few words."""
    first = error.errors(include_url=False)[0]
    at = ".".join(str(part) for part in first["loc"]) or "it"
    if first["type"] == "json_invalid":
        return f"not JSON: {first['ctx']['error']}"
    if first["type"] == "missing":
        return f"{at} is missing"
    return f"{at} is {_short(first['input'])}, {first['msg'].removeprefix('Input ')}"


def read_lines(path: Path, shape: Any = None) -> Iterator[dict[str, Any]]:
    """Records of a JSON-lines file; a last line cut short by a crash is dropped.

    Args:
        path: The file; none where there is none.
        shape: Of each record.

    Raises:
        Damaged: another line does not hold what was written, and which.
    """
    for where, line in lines(path):
        record = _parsed(line, where)
        _check(record, shape, where)
        yield record


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


def mismatch(value: Any, shape: Any, where: str = "") -> str | None:
    """How a value differs from a shape, in a few words; None if it does not.

    A shape is a type, None, a set of allowed words, a tuple of alternatives, a list of one shape
    for all items, `{str: shape}` for all values, or a mapping of keys (`"key?"` may be absent).
    """
    at = where or "it"
    if isinstance(shape, tuple):
        found = [mismatch(value, each, where) for each in shape]
        return None if None in found else found[-1] if len(shape) == 1 else _deepest(found)
    if isinstance(shape, set):
        known = isinstance(value, str) and value in shape
        return None if known else f"{at} is {_short(value)}, not one of {sorted(shape)}"
    if isinstance(shape, list):
        if not isinstance(value, list):
            return f"{at} is {_short(value)}, not a list"
        items = (
            mismatch(item, shape[0], f"{where}.{n}".lstrip(".")) for n, item in enumerate(value)
        )
        return next((problem for problem in items if problem), None)
    if isinstance(shape, dict):
        return _mapping_mismatch(value, shape, where)
    if shape is None:
        return None if value is None else f"{at} is {_short(value)}, not null"
    right = isinstance(value, shape) and (shape is bool or not isinstance(value, bool))
    return None if right else f"{at} is {_short(value)}, not of type {shape.__name__}"


def _mapping_mismatch(value: Any, shape: dict[Any, Any], where: str) -> str | None:
    if not isinstance(value, dict):
        return f"{where or 'it'} is {_short(value)}, not a mapping"
    for key, inner in shape.items():
        if key is str:
            problems = (mismatch(v, inner, f"{where}.{k}".lstrip(".")) for k, v in value.items())
            if problem := next((problem for problem in problems if problem), None):
                return problem
            continue
        name = key.removesuffix("?")
        place = f"{where}.{name}".lstrip(".")
        if name not in value:
            if key.endswith("?"):
                continue
            return f"{place} is missing"
        if problem := mismatch(value[name], inner, place):
            return problem
    return None


def _deepest(found: list[str | None]) -> str:
    """Of several alternatives, what is said of the one that came furthest."""
    return max((text for text in found if text), key=lambda text: text.split(" ")[0].count("."))


def _short(value: Any) -> str:
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**99 else "a huge number"
    return text if len(text) <= 40 else f"{text[:40]}…"


def _check(value: Any, shape: Any, where: str) -> None:
    if shape is not None and (problem := mismatch(value, shape)):
        raise Damaged(where, problem)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise Damaged(str(path), f"not UTF-8 text: {error.reason} at byte {error.start}") from None


def _parsed(text: str | bytes, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Damaged(where, f"not JSON: {error}") from None


def _is_whole(line: str | bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True
