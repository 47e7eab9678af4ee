"""Cases, and what is asked of the command's answer to each."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

ROOT = Path(__file__).parents[2]
LIMIT = 60.0  # seconds a command may take

_CODES = {0, 1, 2}
_UNWANTED = re.compile(
    r"Traceback \(most recent|\w*Warning: |internal error|Segmentation fault|core dumped"
    r"|Exception ignored|leaked|BUG|please report", re.I,
)  # fmt: skip
# Commands for which 1 is an answer and not a failure: they tell it on stdout.
_ANSWERS_WITH_1 = ("audit", "compare", "ablate", "privacy", "deploy")


@dataclass
class Case:
    """One call of the command.

    Attributes:
        words: Its words.
        cwd: Where it is called.
        changes: What was done to a good input, for people.
        ways: Names of the mutations, for counting.
    """

    words: list[str]
    cwd: Path
    changes: list[str] = field(default_factory=list)
    ways: list[str] = field(default_factory=list)


@dataclass
class Outcome:
    """What came of it; `code` is None if it had to be killed."""

    code: int | None
    out: str
    err: str
    seconds: float


Maker = Callable[[Random, Path, Any], Case]


class Command:
    """`fedkd`, ready to be called many times."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.fuzz.worker"],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=_environment(),
        )  # fmt: skip

    def __call__(self, words: list[str], cwd: Path, limit: float = LIMIT) -> Outcome:
        """Call it and wait."""
        request = {"words": words, "cwd": str(cwd), "limit": limit}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return Outcome(**json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        """End it."""
        self._process.stdin.close()
        self._process.wait()


def _environment() -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("FEDKD", "PYTEST", "PYTHONW"))}
    return {**kept, "OMP_NUM_THREADS": "1", "COLUMNS": "100", "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}  # fmt: skip


def problem(case: Case, got: Outcome) -> str | None:
    """What is wrong with an outcome, in one line; None if nothing is."""
    if got.code is None:
        return f"hung: killed after {got.seconds:.0f} s"
    printed = got.out + got.err
    if file := re.search(r"the traceback is in (.+?\.traceback)", got.err):
        printed += Path(file[1]).read_text()
    if found := _UNWANTED.search(printed):
        lines = [line for line in printed.splitlines() if line.strip()]
        places = re.findall(r'File "[^"]*/(\w+/\w+\.py)", line \d+, in (\w+)', printed)
        ours = [f"{a}:{b}" for a, b in places if a.split("/")[0] not in _FOREIGN]
        last = lines[-1] if "Traceback" in found.group() else found.group()
        return f"{last[:200]} [{' < '.join(reversed(ours[-3:]))}]"
    if got.code not in _CODES:
        return f"exit code {got.code} is not documented"
    if got.code == 0 and (got.err.count("\n") > 5 or len(got.err) > 2000):
        return f"exit code 0, but a long stderr: {got.err.strip().splitlines()[0][:200]}"
    if got.code == 0 and not got.out.strip():
        return "exit code 0 and nothing on stdout"
    if got.code and not got.err.strip():
        answers = got.code == 1 and got.out.strip() and case.words[0] in _ANSWERS_WITH_1
        return None if answers else f"exit code {got.code} and nothing on stderr"
    if case.words[:2] == ["deploy", "check"] and re.fullmatch(r"\d+ to mend\s*", got.err):
        return None
    if got.code and "Usage:" not in got.err:
        long = sum(map(len, case.words))
        lines = got.err.strip().splitlines()
        if len(lines) > 3 or len(got.err) > 1500 + 2 * long:
            return f"a message of {len(lines)} lines, {len(got.err)} characters: {lines[0][:150]}"
        if not lines[-1].startswith(("fedkd: ", "interrupted")) and not lines[0].startswith(
            "fedkd: "
        ):
            return f"stderr does not begin with 'fedkd: ': {lines[0][:200]}"
    return None


_FOREIGN = ("typer", "click", "pydantic", "rich", "site", "yaml", "core")
