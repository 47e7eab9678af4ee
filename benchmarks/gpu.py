"""What a GPU gives: fedkd's loops against literal ones, and whether they compute the same.

    python3 benchmarks/gpu.py [--minutes 8] [--parts central,clients] [--log gpu.log]

Needs python3, torch, torchvision and numpy, nothing else of fedkd's requirements; run it from
anywhere. Takes at most `--minutes`; fewer minutes repeat less. A part that fails leaves its
traceback in the log and one line in the table, and the others go on; where it leaves the card
unusable, they go on in a new process. Without a GPU it runs tiny sizes, as a test of itself.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import logging
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
# Read when the library is loaded: without it no product of matrices is the same twice.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

WIDTH = 52  # of what was measured, in the table


class NotThere(Exception):
    """This version of fedkd, or this machine, has not what a part measures."""


class OutOfTime(BaseException):
    """The part has used its share of the time. Nobody on the way may take it for an error."""


@dataclass
class Row:
    """A line of the table.

    Attributes:
        part: Which part measured it.
        what: What was measured.
        shown: The measurement.
        ratio: Against the literal loop, or whatever the line names.
        goal: What the ratio or the measurement was to be.
        verdict: "ok", "BAD", "missed", "-" (no goal).
    """

    part: str
    what: str
    shown: str
    ratio: float | None = None
    goal: str = ""
    verdict: str = "-"

    def __str__(self) -> str:
        """One line."""
        ratio = "" if self.ratio is None else f"{self.ratio:.2f}x"
        return (
            f"{self.part:9} {self.what:{WIDTH}} {self.shown:>24} {ratio:>6} {self.goal:>9} "
            f"{self.verdict}"
        ).rstrip()


@dataclass
class Bench:
    """What a part is given: the device, its time, and where results go."""

    device: str
    minutes: float
    log: Path
    rows: list[Row] = field(default_factory=list)
    part: str = ""
    ends: float = float("inf")

    @property
    def gpu(self) -> bool:
        """Whether there is one."""
        return self.device == "cuda"

    def size(self, full: int, tiny: int) -> int:
        """A number of repetitions: full at 8 minutes, fewer for less, tiny on a CPU."""
        return max(tiny, round(full * min(1.0, self.minutes / 8))) if self.gpu else tiny

    @property
    def left(self) -> float:
        """Seconds that the part has left."""
        return self.ends - time.monotonic()

    def row(
        self,
        what: str,
        shown: str,
        *,
        ratio: float | None = None,
        goal: str = "",
        ok: bool | None = None,
    ) -> None:
        """A measurement; `ok` says whether the goal was met."""
        verdict = "-" if ok is None else "ok" if ok else "missed"
        self._add(Row(self.part, what, shown, ratio, goal, verdict))

    def check(self, what: str, **found: tuple[float, float]) -> None:
        """Results, each with its limit; NaN is beyond any."""
        ok = all(value <= limit for value, limit in found.values())
        text = ", ".join(f"{name} {value:.1e}" for name, (value, _) in found.items())
        most = max(limit for _, limit in found.values())
        self._add(Row(self.part, what, text, None, f"<={most:g}", "ok" if ok else "BAD"))

    def fact(self, what: str, ok: bool, shown: str = "") -> None:
        """Something that has to be so."""
        self._add(Row(self.part, what, shown, None, "", "ok" if ok else "BAD"))

    def _add(self, row: Row) -> None:
        self.rows.append(row)
        print(row, flush=True)

    def problem(self, what: str) -> None:
        """The error under way: one line in the table, all of it in the log."""
        kind, error, _ = sys.exc_info()
        text = str(error).strip().splitlines() or [""]
        if isinstance(error, NotThere | ImportError):
            self._add(Row(self.part, what, f"not there: {text[0]}"[:80]))
            return
        with self.log.open("a", encoding="utf-8") as file:
            file.write(f"== {self.part}: {what}\n{traceback.format_exc()}\n")
        words = f"{kind.__name__ if kind else ''}: {text[0]}"
        self._add(Row(self.part, what, words[:100], verdict="FAILED"))

    @contextmanager
    def trying(self, what: str) -> Iterator[None]:
        """A step whose failure does not stop the part."""
        try:
            yield
        except Exception:
            self.problem(what)
            self.usable()

    def usable(self) -> None:
        """Raise what the card still has to complain about."""
        if self.gpu:
            import torch

            torch.cuda.synchronize()


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Raise `OutOfTime` inside after so many seconds."""

    def over(_signal: int, _frame: object) -> None:
        raise OutOfTime(f"took more than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01), 2.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Warned(logging.Handler):
    """What the library warns of, such as a step that cannot be captured, is part of the result."""

    def __init__(self, bench: Bench) -> None:
        super().__init__(logging.WARNING)
        self._bench = bench

    def emit(self, record: logging.LogRecord) -> None:
        """A line of the table; all of it in the log."""
        text = record.getMessage()
        with self._bench.log.open("a", encoding="utf-8") as file:
            file.write(f"== {self._bench.part}: {record.name}: {text}\n")
        self._bench.row(f"warning: {text[: WIDTH - 9]}", text[WIDTH - 9 : WIDTH + 60])


def commit() -> str:
    """The commit of this checkout, if git knows it."""
    try:
        found = subprocess.run(
            ["git", "-C", str(HERE), "describe", "--always", "--dirty"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return found.stdout.strip() or "unknown"


def where() -> str:
    """Card and versions, in a line."""
    import torch

    card = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no GPU: tiny sizes"
    return (
        f"{card}, torch {torch.__version__}, Python {sys.version.split()[0]}, "
        f"{os.cpu_count()} cores, commit {commit()}"
    )


def main() -> int:
    """Run the parts; exit code 1 if one failed or a result is wrong."""
    import gpu_parts
    import torch

    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="of all parts together")
    parser.add_argument("--parts", help=f"of {','.join(gpu_parts.PARTS)}; default: all")
    parser.add_argument("--log", type=Path, default=Path("gpu.log"), help="for tracebacks")
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)  # of a process before this
    words = parser.parse_args()
    names = words.parts.split(",") if words.parts else list(gpu_parts.PARTS)
    if unknown := set(names) - set(gpu_parts.PARTS):
        parser.error(f"--parts: unknown {unknown.pop()}; known: {', '.join(gpu_parts.PARTS)}")
    begins = time.monotonic()
    ends = begins + 60 * words.minutes
    # A kernel that hangs cannot be interrupted; what was printed until then stays.
    faulthandler.dump_traceback_later(60 * words.minutes + 20, exit=True)
    bench = Bench("cuda" if torch.cuda.is_available() else "cpu", words.minutes, words.log)
    if not bench.gpu:
        torch.set_num_threads(1)
    if words.rows is None:
        words.log.write_text("")
    else:
        bench.rows = [Row(**row) for row in json.loads(words.rows.read_text())]
    logging.getLogger("fedkd").addHandler(Warned(bench))
    gpu_parts.tidy()
    print(where(), flush=True)
    for place, name in enumerate(names):
        share = gpu_parts.PARTS[name].share
        rest = sum(gpu_parts.PARTS[other].share for other in names[place:])
        seconds = (ends - time.monotonic()) * share / rest
        bench.part, bench.ends = name, time.monotonic() + seconds
        started = time.monotonic()
        try:
            with deadline(seconds):
                gpu_parts.PARTS[name].run(bench)
        except (Exception, OutOfTime):
            bench.problem("the part as a whole")
        try:
            bench.usable()
        except Exception:
            bench.problem("the card after it")
            if names[place + 1 :]:
                faulthandler.cancel_dump_traceback_later()
                return _rest(bench, names[place + 1 :], ends)
        print(f"# {name}: {time.monotonic() - started:.1f} of {seconds:.0f} s", flush=True)
        gpu_parts.tidy()
    print(f"\n# {where()}, {time.monotonic() - begins:.0f} s")
    print(f"# {'part':7} {'what':{WIDTH}} {'measured':>24} {'ratio':>6} {'goal':>9} verdict")
    for row in bench.rows:
        print(row)
    words.log.with_suffix(".json").write_text(json.dumps([asdict(row) for row in bench.rows]))
    bad = sum(row.verdict in ("BAD", "FAILED") for row in bench.rows)
    missed = sum(row.verdict == "missed" for row in bench.rows)
    print(f"# {len(bench.rows)} lines, {bad} wrong or failed, {missed} goals missed", flush=True)
    return int(bad > 0)


def _rest(bench: Bench, names: list[str], ends: float) -> int:
    """The remaining parts in a process of their own: this one's card is lost."""
    file = bench.log.with_suffix(".json")
    file.write_text(json.dumps([asdict(row) for row in bench.rows]))
    minutes = max(0.1, (ends - time.monotonic()) / 60)
    command = [sys.executable, __file__, "--minutes", f"{minutes:.2f}", "--parts", ",".join(names)]
    return subprocess.call([*command, "--log", str(bench.log), "--rows", str(file)])


if __name__ == "__main__":
    # The parts import `Bench` and the errors from here: let there be one of each.
    sys.modules["gpu"] = sys.modules["__main__"]
    sys.exit(main())
