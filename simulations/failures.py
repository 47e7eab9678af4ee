"""How a command ends when something is wrong: one line on the screen and an exit code.

Code | Meaning
--- | ---
0 | done
1 | the run failed, or its finding is bad (`audit`, `deploy check`, a cell of a study)
2 | what the user wrote cannot be run: command line, config, data, folder
70 | an error inside fedkd; the traceback is in a file that the line names
75 | stopped by SIGTERM in good order: to be gone on with
130 | interrupted
141 | whoever read the output went away (`fedkd list losses | head -1`)
"""

from __future__ import annotations

import dis
import errno
import sys
import sysconfig
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from fedkd.config import ConfigError
from fedkd.io.extras import MissingExtra
from fedkd.io.text import visible

FAILED, USER_ERROR, INTERNAL, STOPPED, INTERRUPTED, OUTPUT_GONE = 1, 2, 70, 75, 130, 141

LONGEST = 1500  # characters of a line; a config may hold a value of any length
OURS = "fedkd"
_REPORT = "please report it at the project's issue tracker with that file"
_FULL = (errno.ENOSPC, errno.EDQUOT)
_USERS_PATH = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


@dataclass(frozen=True)
class Failure:
    """One line and an exit code."""

    text: str
    code: int


def failure_of(error: BaseException) -> Failure:
    """What a command says about the exception that ended it.

    A `ValueError` is the user's only where a `raise` of ours refused something, and likewise a
    `RuntimeError` is an event only then: from anywhere else both are errors of the program. The
    traceback of those is written to a file.
    """
    if isinstance(error, KeyboardInterrupt):
        return Failure("interrupted", INTERRUPTED)
    if isinstance(error, ConfigError | MissingExtra):
        return Failure(one_line(error), USER_ERROR)
    if isinstance(error, OSError) and (failure := _of_the_system(error)):
        return failure
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return Failure(f"out of memory: {one_line(error) or 'no more could be had'}", FAILED)
    frame = _last(error.__traceback__)
    if frame is not None and _raised_by_us(frame):
        if isinstance(error, ValueError):
            return Failure(one_line(error), USER_ERROR)
        if isinstance(error, RuntimeError):
            return Failure(one_line(error), FAILED)
    return _unexpected(error)


def one_line(error: BaseException | str) -> str:
    """The message of an error and its notes, without line breaks or control characters."""
    notes = getattr(error, "__notes__", [])
    text = " ".join(str(error).split("\n")) + "".join(f" ({note})" for note in notes)
    text = " ".join(text.split("\t"))
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text.strip())
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} … ({len(text):,} characters)"


@contextmanager
def noted(log: Path, go_on: str = "") -> Iterator[None]:
    """Write what ends a run to its log, and name log and remedy in the line on the screen.

    Args:
        log: File to which the traceback is appended.
        go_on: The command that goes on with the run.
    """
    try:
        yield
    except ConfigError:
        raise  # its message is complete
    except Exception as error:
        if type(error).__name__ == "Interrupted":
            raise
        try:
            with log.open("a", encoding="utf-8") as file:
                file.write(visible("".join(traceback.format_exception(error)), keep="\n\t"))
        except OSError:  # a full disk: the line alone has to do
            raise error from None
        more = f"; go on with: {go_on}" if go_on and "--resume" not in str(error) else ""
        error.add_note(f"log: {log}{more}")
        raise


def _of_the_system(error: OSError) -> Failure | None:
    """What the operating system refused; None if it says nothing of a file or the disk."""
    if isinstance(error, BrokenPipeError):
        return Failure("", OUTPUT_GONE)
    if error.errno is None:  # raised by hand: the message is ours
        known = isinstance(error, _USERS_PATH) and _is_ours(_last(error.__traceback__))
        return Failure(one_line(error), USER_ERROR) if known else None
    what = error.strerror or type(error).__name__
    where = "" if error.filename is None else f"{error.filename}: "
    if error.errno in _FULL:
        return Failure(one_line(f"{where}{what}: make room, then try again"), FAILED)
    if isinstance(error, _USERS_PATH) and where:
        return Failure(one_line(f"{where}{what}"), USER_ERROR)
    return Failure(one_line(f"{where}{what}"), FAILED)


def _unexpected(error: BaseException) -> Failure:
    frame = _last(error.__traceback__)
    what = f"{type(error).__name__}: {one_line(error)}" if str(error) else type(error).__name__
    users = _users_file(error.__traceback__)
    text = f"{users}: {what}" if users else f"internal error: {what}"
    if not users and frame is not None:
        text += f" [{frame.tb_frame.f_globals.get('__name__')}, line {frame.tb_lineno}]"
    file = _write(error)
    if file is not None:
        text += f"; the traceback is in {file}"
    if users:
        return Failure(one_line(text), FAILED)
    return Failure(one_line(f"{text}; {_REPORT}" if file else text), INTERNAL)


def _write(error: BaseException) -> Path | None:
    """The traceback in a file; None where none can be written."""
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="fedkd-", suffix=".traceback", delete=False, encoding="utf-8",
            errors="backslashreplace",
        ) as file:  # fmt: skip
            file.write(f"{' '.join(sys.argv)}\n\n")
            traceback.print_exception(error, file=file)
            return Path(file.name)
    except OSError:
        return None


def _last(trace: TracebackType | None) -> TracebackType | None:
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace


def _is_ours(trace: TracebackType | None) -> bool:
    name = "" if trace is None else str(trace.tb_frame.f_globals.get("__name__", ""))
    return name.split(".")[0] in OURS or name == "__main__"


def _raised_by_us(trace: TracebackType) -> bool:
    """Whether a `raise` statement in our own code made the exception.

    A compiled function (NumPy, torch) has no Python frame, so the innermost one may be ours where
    its exception is not: the instruction at fault tells.
    """
    code = trace.tb_frame.f_code.co_code
    return _is_ours(trace) and code[trace.tb_lasti] == dis.opmap["RAISE_VARARGS"]


def _users_file(trace: TracebackType | None) -> str:
    """`FILE, line N` where the user's own module (a plugin) is the last one that is not a library.

    An empty string if our own code called the library.
    """
    library = (sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"), "<")
    found = ""
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if _is_ours(trace):
            found = ""
        elif "-packages" not in file and not file.startswith(library):
            found = f"{file}, line {trace.tb_lineno}"
        trace = trace.tb_next
    return found
