"""FedAvg and fedkd side by side: accuracy and bytes per round on one and the same split.

FedAvg is Flower's own strategy, all clients in every round. It starts from the student's initial
weights, and each client trains the student's architecture as it trains its teacher: same images,
same `teachers` section, same random streams. Both run in this process, without Ray.

Run `python benchmarks/fedavg.py configs/quickstart.yaml [key=value ...] [--only fedavg|fedkd]`.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from rich.console import Console
from rich.table import Table

from fedkd.build import build_data, build_network, check, device_of
from fedkd.config import ConfigError, Experiment, load_experiment
from fedkd.data.splits import FederatedData
from fedkd.evaluation import evaluate
from fedkd.models.network import Network
from fedkd.randomness import stream_seed
from fedkd.rounds import threads
from fedkd.rundir import RunDirectory, versions
from fedkd.teachers.sgd import fit
from simulations.live import percent
from simulations.local import LocalGrid, run_local
from simulations.tables import human_bytes
from strategies.records import explain, wire_bytes

# What teaches the student. `describe` (once) and `evaluate` (a measurement) are told apart.
KNOWLEDGE_PHASES = ("train", "knowledge")
SIDES: tuple[str, ...] = ("fedavg", "fedkd")

Row = dict[str, Any]  # round, accuracy, down, up, and what else a side knows about the round


class CountingGrid(Grid):
    """A grid that counts the bytes of every exchange and hands replies back in node order.

    Flower's FedAvg sums replies in the order in which it drew the clients, from the global
    generator; floating-point sums would differ from run to run.

    Args:
        grid: Moves the messages.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self.traffic: list[dict[str, int]] = []  # one entry per exchange: bytes down and up

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send, wait, count. Raises `RuntimeError` if a client failed: averages would hide it."""
        letters = list(messages)
        if not letters:
            return []
        down = sum(map(wire_bytes, letters))
        replies = list(self._grid.send_and_receive(letters, timeout=timeout))
        for reply in replies:
            if reply.has_error():
                raise RuntimeError(f"a client failed: {explain(reply.error.reason or '')}")
        self.traffic.append({"down": down, "up": sum(map(wire_bytes, replies))})
        return sorted(replies, key=lambda reply: reply.metadata.src_node_id)

    def set_run(self, run: Any) -> None:
        """Passed on."""
        self._grid.set_run(run)

    @property
    def run(self) -> Any:
        """Passed on."""
        return self._grid.run

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        """Flower's deprecated constructor."""
        raise NotImplementedError("use flwr.app.Message")

    def get_node_ids(self) -> Iterable[int]:
        """Passed on."""
        return self._grid.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Unused: FedAvg sends and receives at once, and only that is counted."""
        raise NotImplementedError("only send_and_receive is counted")

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Unused, as `push_messages`."""
        raise NotImplementedError("only send_and_receive is counted")


def averaging_app(experiment: Experiment, data: FederatedData) -> ClientApp:
    """A Flower client that trains the global weights on its shard and sends them back."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        client = int(context.node_config["partition-id"])
        number = int(message.content.config_records["config"]["server-round"])  # type: ignore[arg-type]
        network = _network(experiment, data, message.content.array_records["arrays"])
        shard = data.shard(client)
        with threads(experiment.resources.client_cpus):
            fit(
                network,
                shard,
                experiment.teachers,
                seed=stream_seed(experiment.seed, "teach", client, number),
            )
        weight = MetricRecord({"num-examples": len(shard)})
        content = RecordDict({"arrays": _arrays(network), "metrics": weight})
        return Message(content, reply_to=message)

    return app


def run_fedavg(experiment: Experiment) -> tuple[list[Row], float]:
    """FedAvg on the experiment's split: a row per round, and the seconds all rounds took."""
    data = build_data(experiment)
    grid = CountingGrid(LocalGrid(averaging_app(experiment, data), experiment.clients))
    strategy = FedAvg(
        fraction_train=1.0,
        fraction_evaluate=0.0,
        min_train_nodes=experiment.clients,
        min_available_nodes=experiment.clients,
    )

    def judge(_round: int, arrays: ArrayRecord) -> MetricRecord:
        return MetricRecord({"accuracy": evaluate(_network(experiment, data, arrays), data.test)})

    started = time.perf_counter()
    with threads(experiment.resources.server_threads):
        result = strategy.start(
            grid,
            _arrays(_network(experiment, data)),
            num_rounds=experiment.rounds,
            evaluate_fn=judge,
        )
    seconds = time.perf_counter() - started
    judged = result.evaluate_metrics_serverapp
    rows = [
        {"round": number, "accuracy": judged[number]["accuracy"], **traffic}
        for number, traffic in enumerate(grid.traffic, start=1)
    ]
    return rows, seconds


def run_fedkd(experiment: Experiment, output: Path) -> tuple[list[Row], dict[str, Any]]:
    """The experiment itself: a row per round, and its summary."""
    run = run_local(experiment, run=RunDirectory.new(experiment, output))
    ledger = run.ledger_entries()
    rows = []
    for record in run.metrics("round"):
        number = record["round"]
        sent = [e for e in ledger if e["round"] == number and e["phase"] in KNOWLEDGE_PHASES]
        rows.append(
            {
                "round": number,
                "accuracy": record["student"]["accuracy"],
                "ensemble": (record.get("ensemble") or {}).get("accuracy"),
                "down": sum(e["down"] for e in sent),
                "up": sum(e["up"] for e in sent),
            }
        )
    return rows, {**run.read_json("summary.json"), "run": str(run.path)}


def totals(rows: Sequence[Row]) -> list[int]:
    """Bytes sent in both directions up to and including each round."""
    sums, total = [], 0
    for row in rows:
        total += row["down"] + row["up"]
        sums.append(total)
    return sums


def rounds_table(title: str, sides: dict[str, list[Row]]) -> Table:
    """A row per round: what each side has reached, and what it has sent so far."""
    table = Table(title=title, title_justify="left")
    for heading in ("round", "FedAvg", "fedkd student", "FedAvg, MB so far", "fedkd, MB so far"):
        table.add_column(heading, justify="right")
    accuracies = {name: [percent(row["accuracy"]) for row in rows] for name, rows in sides.items()}
    sizes = {name: [f"{size / 1e6:.3f}" for size in totals(r)] for name, r in sides.items()}
    for place in range(max(map(len, sides.values()))):
        cells = [
            column[name][place] if name in column else "–"
            for column in (accuracies, sizes)
            for name in SIDES
        ]
        table.add_row(str(place + 1), *cells)
    return table


def last_lines(facts: dict[str, Any]) -> list[str]:
    """Final accuracies, the ratio of bytes, and what the table leaves out."""
    sides = {name: facts[name]["rounds"] for name in SIDES if name in facts}
    line = "final: " + ", ".join(f"{n} {percent(r[-1]['accuracy'])}" for n, r in sides.items())
    if len(sides) == 2:
        averaging, distilling = (totals(rows)[-1] for rows in sides.values())
        line += f"; FedAvg sent {averaging / distilling:.2f} times the bytes of fedkd"
    lines = [line]
    if "fedavg" in facts:
        lines.append(f"FedAvg: {facts['fedavg']['seconds']:.1f} s for all rounds")
    if "fedkd" in facts:
        summary = facts["fedkd"]["summary"]
        known = {"ensemble": (summary.get("ensemble") or {}).get("accuracy")}
        known |= {name: summary.get(name) for name in ("oracle", "ceiling")}
        lines.append("fedkd: " + ", ".join(f"{name} {percent(v)}" for name, v in known.items()))
        seconds = summary["seconds"].items()
        lines.append(
            "fedkd, seconds: " + ", ".join(f"{name} {spent:.1f}" for name, spent in seconds)
        )
        apart = {
            phase: human_bytes(size["down"] + size["up"])
            for phase, size in summary["bytes"].items()
            if phase not in KNOWLEDGE_PHASES
        }
        apart["transfer set"] = human_bytes(summary["transfer"]["bytes"]) + " per client, if sent"
        lines.append("fedkd, not counted: " + ", ".join(f"{n} {s}" for n, s in apart.items()))
    return lines


def _network(
    experiment: Experiment, data: FederatedData, arrays: ArrayRecord | None = None
) -> Network:
    """The student, fresh or with these weights."""
    network = build_network(experiment, experiment.student.model, data, "student")
    if arrays is not None:
        network.body.load_state_dict(arrays.to_torch_state_dict())
    return network.to(device_of(experiment))


def _arrays(network: Network) -> ArrayRecord:
    # The body alone: both ends know the constants of the preprocessing.
    return ArrayRecord({name: value.cpu() for name, value in network.body.state_dict().items()})


def main(words: Sequence[str] | None = None) -> None:
    """Run what was asked, print the table, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", help="a YAML file")
    parser.add_argument("overrides", nargs="*", help="key=value, e.g. rounds=2")
    parser.add_argument("--only", choices=SIDES, help="run one side")
    parser.add_argument("--output", type=Path, help="folder of the results; default: the config's")
    options = parser.parse_intermixed_args(words)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    experiment = load_experiment(options.config, options.overrides)
    check(experiment)
    output = options.output or Path(experiment.output)
    output.mkdir(parents=True, exist_ok=True)
    facts: dict[str, Any] = {
        "config": experiment.model_dump(mode="json"),
        "versions": versions(),
    }
    if options.only != "fedkd":
        rows, seconds = run_fedavg(experiment)
        facts["fedavg"] = {"rounds": rows, "seconds": seconds}
    if options.only != "fedavg":
        rows, summary = run_fedkd(experiment, output)
        facts["fedkd"] = {"rounds": rows, "summary": summary}
    sides = {name: facts[name]["rounds"] for name in SIDES if name in facts}
    title = f"{experiment.name} · seed {experiment.seed} · {experiment.clients} clients"
    console = Console()
    console.print(rounds_table(title, sides))
    for line in last_lines(facts):
        console.print(line, highlight=False, soft_wrap=True)
    place = output / f"fedavg-{experiment.name}-seed{experiment.seed}.json"
    place.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    console.print(f"rows  {place}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    try:
        main()
    except (ConfigError, FileNotFoundError) as error:
        sys.exit(f"fedavg: {error}")
