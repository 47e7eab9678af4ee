"""A process that has imported everything and forks once per command: fast, and safe.

It reads one JSON object per line (`words`, `cwd`, `limit`) and answers with one (`code`, `out`,
`err`, `seconds`). A command that takes longer than `limit` seconds is killed: its code is `null`.
"""

import contextlib
import importlib
import json
import logging
import os
import pkgutil
import resource
import signal
import sys
import tempfile
import time
import traceback
from typing import Any

from PIL import Image

# Memory and size of a file that a command may have, in bytes: a bomb must not end the machine.
MEMORY, LARGEST_FILE = 12 * 2**30, 2**28


def serve(requests: Any, answer: Any) -> None:
    """Answer until there are no more requests."""
    for line in requests:
        given = json.loads(line)
        answer.write(json.dumps(execute(given["words"], given["cwd"], given["limit"])) + "\n")
        answer.flush()


def execute(words: list[str], cwd: str, limit: float) -> dict[str, Any]:
    """Run `fedkd WORDS` in a child."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        begun = time.monotonic()
        child = os.fork()
        if child == 0:
            _be_fedkd(words, cwd, out.fileno(), err.fileno())
        code = _wait(child, begun + limit)
        seconds = time.monotonic() - begun
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="backslashreplace"))
    return {"code": code, "out": texts[0], "err": texts[1], "seconds": seconds}


def _wait(child: int, deadline: float) -> int | None:
    pause = 0.002
    hung = False
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() > deadline:
            hung = True
            os.killpg(child, signal.SIGKILL)
        time.sleep(pause)
        pause = min(pause * 1.5, 0.1)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)  # what it may have left behind
    return None if hung else os.waitstatus_to_exitcode(status)


def _be_fedkd(words: list[str], cwd: str, out: int, err: int) -> None:
    """The child: what the command `fedkd` does, and an end without any of the parent's clean-up."""
    code = 1
    try:
        os.setsid()
        nothing = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((nothing, 0), (out, 1), (err, 2)):
            os.dup2(source, target)
        sys.stdin = open(0, encoding="utf-8")  # noqa: SIM115
        sys.stdout = open(1, "w", encoding="utf-8")  # noqa: SIM115
        sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE, LARGEST_FILE))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.chdir(cwd)
        os.environ["HOME"] = tempfile.tempdir = cwd
        sys.argv = ["fedkd", *words]
        from fedkd.simulations.cli.main import main

        main()
        code = 0
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            code = end.code or 0
        else:
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError):
                code = code or 120
        os._exit(code & 255)


def prepare() -> None:
    """Import what the commands import, and let no command start Ray."""
    for module in pkgutil.walk_packages(importlib.import_module("fedkd").__path__, "fedkd."):
        importlib.import_module(module.name)
    for name in ("matplotlib.backends.backend_svg", "opacus.validators"):
        importlib.import_module(name)
    Image.preinit()
    logging.root.handlers.clear()  # opacus adds one
    import fedkd.simulations.ray
    from fedkd.simulations.local import run_local

    fedkd.simulations.ray.run_ray = run_local


if __name__ == "__main__":
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    del sys.path[0]  # the working directory, where `-m` puts it; PYTHONPATH holds the tree
    prepare()
    serve(sys.stdin, channel)
