"""What a message costs a real node: a fresh process that imports, finds its data and answers.

    python benchmarks/message_cost.py [CONFIG] [key=value ...] [--against CHECKOUT] [--repeat 3]
    python benchmarks/message_cost.py --bytes [CONFIG] [key=value ...]

A SuperNode starts a process for every message. The cost is what a process of this checkout spends
until it stands ready (no training): Flower and torch alone, then with fedkd's imports, then the
first message of a run (the data set is read and dealt) and a later one (the node's own part is
read). CPU seconds, the least of some repetitions: wall seconds depend on who else is working.
`--against` measures another checkout in the same way and prints the ratios.

`--bytes` runs two rounds in this process instead and prints of what the bytes of each message are:
Flower's wrapping, the job or the numbers and headers of a reply, arrays, and bytes of a codec.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]

FLOOR = "import torch, flwr.clientapp, flwr.app"
IMPORTS = "import fedkd.simulations.client_app"
DESCRIBE = """
import json, sys
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from fedkd.simulations.client_app import app
TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1
config, fingerprint, state = sys.argv[1:4]
from fedkd.config import make_experiment
experiment = make_experiment(json.loads(config))
sent = experiment.to_bytes() if hasattr(experiment, "to_bytes") else config  # older checkouts
job = {"config": sent, "run": "cost", "round": 1, "state": "", "fingerprint": fingerprint}
node = {"partition-id": 0, "num-partitions": json.loads(config)["clients"], "state-dir": state}
context = Context(run_id=1, node_id=2, node_config=node, state=RecordDict(), run_config={})
content = RecordDict({"job": ConfigRecord(job)})
letter = Message(content, dst_node_id=2, message_type="query.describe")
letter.metadata.__dict__["_message_id"] = "1"
print("FINGERPRINT", app(letter, context).content["describe"]["fingerprint"])
"""
CONFIG = """
import sys
from fedkd.config import load_experiment
print(load_experiment(sys.argv[1], sys.argv[2:]).to_json())
"""


def child(checkout: Path, code: str, *words: str) -> tuple[float, str]:
    """(CPU seconds, last line) of a fresh process that runs `code` on this checkout's packages."""
    env = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    env |= {"PYTHONWARNINGS": "ignore", "FLWR_TELEMETRY_ENABLED": "0"}
    before = os.times()
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        cwd=tempfile.gettempdir(), env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    after = os.times()
    if done.returncode != 0:
        sys.exit(done.stderr)
    spent = after.children_user + after.children_system
    spent -= before.children_user + before.children_system
    return spent, (done.stdout.splitlines() or [""])[-1]


def measure(checkout: Path, config: str, overrides: list[str], repeat: int) -> dict[str, float]:
    """Least CPU seconds of each case."""
    _, text = child(checkout, CONFIG, str(Path(config).resolve()), *overrides)
    text = json.dumps(json.loads(text), sort_keys=True, separators=(",", ":"))
    found: dict[str, list[float]] = {}
    for _ in range(repeat):
        found.setdefault("Flower and torch alone", []).append(child(checkout, FLOOR)[0])
        found.setdefault("with our imports", []).append(child(checkout, IMPORTS)[0])
        with tempfile.TemporaryDirectory() as state:
            # A node whose transfer set is not the server's keeps nothing: ask for it first.
            _, printed = child(checkout, DESCRIBE, text, "unknown", state)
            fingerprint = printed.split()[-1]
            for name in ("first message of a run", "a later message"):
                found.setdefault(name, []).append(
                    child(checkout, DESCRIBE, text, fingerprint, state)[0]
                )
    return {name: min(values) for name, values in found.items()}


def print_bytes(config: str, overrides: list[str]) -> None:
    """Mean bytes of each kind of message, by what they are for."""
    sys.path.insert(0, str(HERE))
    from flwr.app import ConfigRecord, Message, MetricRecord
    from flwr.app.message.arraychunk import ArrayChunk
    from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

    from fedkd.config import load_experiment
    from fedkd.simulations.local import LocalGrid, run_local

    parts = ("Flower's", "job, header", "arrays", "coded")
    found: dict[tuple[str, str], list[tuple[int, ...]]] = {}

    def note(message: Message, way: str, kind: str) -> None:
        sums = dict.fromkeys(parts, 0)
        for item in get_all_nested_objects(message).values():
            size = len(item.deflate())
            coded = 0
            if isinstance(item, ConfigRecord) and way == "up":
                coded = sum(len(v) for v in item.values() if isinstance(v, bytes))
            own = isinstance(item, ConfigRecord | MetricRecord)
            array = isinstance(item, ArrayChunk)
            sums["job, header" if own else "arrays" if array else "Flower's"] += size - coded
            sums["coded"] += coded
        found.setdefault((kind, way), []).append(tuple(sums.values()))

    class Watched(LocalGrid):
        def _answer(self, message: Message) -> Message:
            kind = message.metadata.message_type
            note(message, "down", kind)
            reply = super()._answer(message)
            note(reply, "up", kind)
            return reply

    with tempfile.TemporaryDirectory() as folder:
        words = ["rounds=2", "evaluation.baselines=[]", f"output={folder}", *overrides]
        experiment = load_experiment(config, words)
        from unittest import mock

        with mock.patch("fedkd.simulations.local.LocalGrid", Watched):
            run_local(experiment)
    print(f"{'bytes of a message':24}{''.join(f'{part:>13}' for part in parts)}{'all':>10}")
    for (kind, way), rows in found.items():
        means = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
        cells = "".join(f"{mean:13,.0f}" for mean in means)
        print(f"{kind + ' ' + way:24}{cells}{sum(means):10,.0f}")


def main() -> None:
    """Measure, print, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", nargs="?", default=str(HERE / "configs" / "quickstart.yaml"))
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--against", type=Path, help="another checkout, as the `before`")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--bytes", action="store_true", help="what the bytes of messages are")
    options = parser.parse_intermixed_args()
    if options.bytes:
        print_bytes(options.config, options.overrides)
        return
    # Each checkout resolves the config itself: older ones know fewer keys.
    now = measure(HERE, options.config, options.overrides, options.repeat)
    other = options.against
    before = (
        measure(other.resolve(), options.config, options.overrides, options.repeat) if other else {}
    )
    print(f"{'CPU seconds':26}{'before':>9}{'now':>9}{'ratio':>9}")
    for name, seconds in now.items():
        then = before.get(name)
        cells = (f"{then:9.2f}", f"{then / seconds:8.2f}x") if then else (f"{'-':>9}", "")
        print(f"{name:26}{cells[0]}{seconds:9.2f}{cells[1]}")


if __name__ == "__main__":
    main()
