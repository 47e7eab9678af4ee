"""Many cases: `python -m tests.fuzz --cases 500 --kind run --first 1000`."""

import argparse
import collections
import re
import shutil
import tempfile
import time
import traceback
from pathlib import Path

from tests.fuzz.engine import Command
from tests.fuzz.fuzzing import attempt, named
from tests.fuzz.makers import MAKERS
from tests.fuzz.material import Material


def main() -> None:
    """Run cases, show faults by kind, count the mutations."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--kind", choices=list(MAKERS), action="append", help="default: all")
    parser.add_argument("--cases", type=int, default=60, help="of all kinds together")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--limit", type=float, default=60, help="seconds a command may take")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no case after these")
    parser.add_argument("--keep", action="store_true", help="keep the folders of faults")
    parser.add_argument("--show", action="store_true", help="show what every command printed")
    given = parser.parse_args()
    kinds = given.kind or list(MAKERS)
    counts: collections.Counter[str] = collections.Counter()
    ways: collections.Counter[str] = collections.Counter()
    faults: dict[str, list[str]] = {}
    home = Path(tempfile.mkdtemp(prefix="fedkd-fuzz-"))
    command = Command()
    material = Material(command, home / "material")
    slowest = (0.0, "")
    begun, done = time.monotonic(), 0
    for number in range(given.cases):
        if time.monotonic() - begun > given.seconds:
            break
        done += 1
        kind, seed = kinds[number % len(kinds)], given.first + number // len(kinds)
        place = home / named(kind, seed)
        try:
            case, got, wrong = attempt(kind, seed, place, command, material, given.limit)
        except Exception:  # a fault of the fuzzer itself: reported, and on to the next
            traceback.print_exc()
            print(f"[{kind} {seed}] cannot be made")
            continue
        counts[f"{kind}: exit {got.code}"] += 1
        ways.update(f"{kind}: {way}" for way in case.ways)
        slowest = max(slowest, (got.seconds, f"{kind} {seed}"))
        if given.show or wrong:
            words = " ".join(repr(w) if len(w) < 60 else repr(w[:60]) + "…" for w in case.words)
            print(f"[{kind} {seed}] fedkd {words}\n    {case.changes} -> {got.code}")
            if given.show:
                print(got.out[-1500:], got.err[-3000:], sep="\n")
        if wrong:
            print(f"    {wrong}", flush=True)
            faults.setdefault(re.sub(r"[0-9]+|'[^']*'|/\S+", "·", wrong), []).append(
                f"{kind} {seed}: {wrong}"
            )
        if not (wrong and given.keep):
            shutil.rmtree(place, ignore_errors=True)
    command.close()
    if not given.keep:
        shutil.rmtree(home, ignore_errors=True)
    print("\n== exit codes", *(f"{n:6} {key}" for key, n in sorted(counts.items())), sep="\n")
    print("== mutations", *(f"{n:6} {key}" for key, n in sorted(ways.items())), sep="\n")
    print(f"slowest: {slowest[0]:.1f} s ({slowest[1]})")
    total = sum(map(len, faults.values()))
    print(f"== {total} faults of {len(faults)} kinds in {done} cases")
    for _, same in sorted(faults.items(), key=lambda item: -len(item[1])):
        print(f"{len(same):4}  {same[0]}" + "".join(f" | {x.split(':')[0]}" for x in same[1:6]))


main()
