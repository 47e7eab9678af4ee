"""`python -m tests.golden [--write] [PATH ...]`: compare, or keep, what the paths come to here."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.golden.file import differences, expected, write
from tests.golden.machine import machine
from tests.golden.paths import PATHS, values_of


def main() -> int:
    """Exit code 1 if a value differs and is not written."""
    parser = argparse.ArgumentParser(prog="python -m tests.golden", description=__doc__)
    parser.add_argument("paths", nargs="*", metavar="PATH", help=f"of: {', '.join(PATHS)}")
    parser.add_argument("--write", action="store_true", help="keep the values as those expected")
    words = parser.parse_args()
    if unknown := set(words.paths) - set(PATHS):
        parser.error(f"unknown path {unknown.pop()!r}; expected one of {', '.join(PATHS)}")
    here, moved = machine(), []
    print(f"{here}{'' if expected(here) else ': no values yet'}")
    for name in words.paths or PATHS:
        started = time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            found = values_of(name, Path(folder))
        moved += differences(name, expected(here), found)
        print(f"{name}: {len(found)} values, {time.process_time() - started:.1f} s", flush=True)
        if words.write:
            write(here, name, found)
    print("\n".join(moved) or "nothing moved")
    return int(bool(moved) and not words.write)


if __name__ == "__main__":
    sys.exit(main())
