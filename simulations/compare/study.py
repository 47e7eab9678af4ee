"""Variants of one experiment side by side: fedkd's own rounds, or a baseline, per row and seed.

methods/NAME/seed0/     fedkd's own run directory, less the knowledge of its rounds
teachers/HASH/          teachers that several of fedkd's rows share
results.csv  rounds.csv
"""

from __future__ import annotations

import json
import math
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NotRequired, TypeVar

from typing_extensions import TypedDict

from fedkd.config import ConfigError, Experiment, one_head
from fedkd.data.images import ImageSet
from fedkd.data.splits import FederatedData
from fedkd.io.records import read_json
from fedkd.knowledge.store import write_atomically
from fedkd.models.costs import size_of
from fedkd.rounds import Notify, computing, experiment_context, silent
from fedkd.rounds.outlook import Outlook, several
from fedkd.runs.choice import kept_round, validated
from fedkd.runs.directory import RunDirectory, versions, write_json
from fedkd.runs.events import ClientEvaluated, MessageCounted, RoundFinished, holdout_accuracies
from fedkd.simulations.baselines import BASELINES
from fedkd.simulations.baselines.base import Outcome, RoundResult
from fedkd.simulations.baselines.loop import check_plain
from fedkd.simulations.client_app import make_client_app
from fedkd.simulations.compare.config import Comparison, SideBySideConfig
from fedkd.simulations.compare.entries import Entry
from fedkd.simulations.compare.grid import Ablation
from fedkd.simulations.compare.report import write_report
from fedkd.simulations.compare.results import results, write_tables
from fedkd.simulations.compare.sweep import Sweep
from fedkd.simulations.compare.teachers import TeacherCache, teachers_key
from fedkd.simulations.local import run_local
from fedkd.simulations.machine import check_machine
from fedkd.studies.engine import Cell, Found, Record, Study, spread

# Between the name of a row and the number of its draw.
_DRAW = " draw "

# Phases of a round that measure and are no part of a method; baselines do not count theirs either.
_MEASURED = "evaluate"

Config = TypeVar("Config", bound=SideBySideConfig)


class RoundRecord(TypedDict):
    """One round of a row."""

    round: int
    accuracy: float | None
    ece: float | None
    up: float | None
    down: float | None
    seconds: float | None


class RowRecord(TypedDict):
    """What came of a row and seed."""

    settings: dict[str, Any]
    classes: list[str]
    per_class: list[float | None]
    has_student: bool
    rounds: list[RoundRecord]
    final: NotRequired[float | None]
    best: NotRequired[float | None]
    best_round: NotRequired[int | None]
    worst_client: NotRequired[float | None]
    ece: NotRequired[float | None]
    up: NotRequired[float | None]
    down: NotRequired[float | None]
    transfer: NotRequired[float | None]
    seconds: NotRequired[float | None]
    joules: NotRequired[float | None]
    multiply_adds: NotRequired[int | None]
    teachers: NotRequired[float | None]
    spent: NotRequired[float | None]


class SideBySide(Study[Config, Entry]):
    """A row per entry of the config.

    Args:
        config: Which rows there are.
        share: Train teachers that are the same for several rows once.
    """

    records = (RowRecord,)

    def __init__(self, config: Config, *, share: bool = True) -> None:
        super().__init__(config)
        self.share = share

    def check(self) -> None:
        """Check all rows, and split the images once for each."""
        seen = set()
        for cell in self.cells:
            if cell.seed != self.config.seeds[0]:
                continue
            experiment = _experiment(cell)
            _check_modalities(cell)
            try:
                if cell.what.baseline is not None:
                    check_plain(experiment)
                if experiment.hash in seen:
                    continue
                seen.add(experiment.hash)
                check_machine(experiment, workers=False)
                experiment_context(experiment)
            except ConfigError as error:
                raise ConfigError(f"{cell.name}: {error}") from None

    def make_cells(self) -> list[Cell[Entry]]:
        """Each row for each seed."""
        return [
            Cell(
                entry.name,
                seed,
                f"methods/{entry.name}/seed{seed}",
                entry.seeded(seed),
                entry,
                {"baseline": entry.baseline and entry.baseline.model_dump(mode="json")},
            )
            for seed in self.config.seeds
            for entry in self.config.entries()
        ]

    def images(self, seed: int) -> Mapping[str, Mapping[str, ImageSet]]:
        """Those of every way in which rows take their images."""
        found = {}
        for experiment in (_experiment(cell) for cell in self.cells if cell.seed == seed):
            key = json.dumps([seed, experiment.data.model_dump(mode="json")])
            if key not in found:
                data = experiment_context(experiment).data
                found[key] = {"transfer": data.transfer.images, "test": data.test}
                for name, side in data.sides.items():
                    own = {f"{name} transfer": side.transfer.images, f"{name} test": side.test}
                    found[key] |= own
        return found

    def run_cell(self, folder: Path, cell: Cell[Entry], notify: Notify = silent) -> Record:
        """One row for one seed: rounds, verdicts of the clients, bytes, seconds."""
        experiment, chosen = _experiment(cell), cell.what.baseline
        started = time.perf_counter()
        space = experiment_context(experiment)
        if chosen is None:
            outcome = self._run_fedkd(folder, cell, notify)
            has_student = True
        else:

            def on_round(result: RoundResult) -> None:
                accuracy, rounds = result.accuracy, experiment.rounds
                notify("round", round=result.round, rounds=rounds, accuracy=accuracy)

            baseline = BASELINES.create(chosen.name, **chosen.options)
            with computing(experiment.resources, experiment.resources.server_threads):
                outcome = baseline.run(space, on_round)
            has_student = baseline.has_student
        wall = time.perf_counter() - started
        rounds = range(1, experiment.rounds + 1)
        clients = len({client for number in rounds for client in space.cohort(number).asked})
        facts = _facts(outcome, space.data, clients, has_student)
        # What is measured would leave out the teachers that other rows have trained.
        watts = experiment.resources.energy.watts
        facts["joules"] = None if watts is None else facts["seconds"] * watts
        if has_student:
            student = space.network(experiment.student.model, "student")
            facts["multiply_adds"] = size_of(student, space.data.test.shape).multiply_adds
        return facts | {"wall": wall}

    def results(self, folder: Path, found: Found) -> Record:
        """Rows with means and deviations over the seeds."""
        return results(self.config.entries(), found)

    def write(self, folder: Path, results: Record) -> None:
        """Tables and page."""
        write_tables(folder, results)
        write_report(self.config, folder, results)

    def _run_fedkd(self, folder: Path, cell: Cell[Entry], notify: Notify) -> Outcome:
        """The real path of `fedkd run --runner local`, from its last checkpoint if it has one."""
        experiment = _experiment(cell)
        run = _run_directory(folder / cell.path, experiment)
        cache, key = None, teachers_key(experiment)
        if self.share and key is not None:
            cache = TeacherCache(folder / "teachers" / key)

        def pass_on(event: str, **facts: Any) -> None:
            if event == "round":
                accuracy, number = facts["student"]["accuracy"], facts["round"]
                if cache is not None:
                    write_json(run.path / "saved.json", _saved(run, cache))
                notify("round", round=number, rounds=experiment.rounds, accuracy=accuracy)
            elif event != "done":
                notify(event, **facts)

        app = make_client_app([] if cache is None else [cache])
        run_local(experiment, run=run, notify=pass_on, client_app=app)
        outcome = read_run(run)
        shutil.rmtree(run.path / "knowledge")  # megabytes per round, and the report is written
        return outcome


def _check_modalities(cell: Cell[Entry]) -> None:
    """Refuse a baseline that needs one set of images for all. Raises `ConfigError`."""
    chosen = cell.what.baseline
    if chosen is not None:
        who, where = f"baseline {chosen.name!r}", f"methods.{cell.name}: student.heads"
        one_head(_experiment(cell).student, who, where)
    if chosen is None or not _experiment(cell).crosses_modalities:
        return
    able = [name for name in BASELINES.names() if _crosses(name)]
    if chosen.name not in able:
        raise ConfigError(
            f"methods.{cell.name}: baseline {chosen.name!r} shares weights or images, and clients "
            "see another modality than the server's model (teachers.modality, student.modality); "
            f"take {', '.join(able)}"
        )


def _crosses(name: str) -> bool:
    return bool(getattr(BASELINES.get(name), "crosses_modalities", False))


class CompareStudy(SideBySide[Comparison]):
    """`fedkd compare`."""

    config_class = Comparison


class AblationStudy(SideBySide[Ablation]):
    """`fedkd ablate`."""

    config_class = Ablation


class SweepStudy(SideBySide[Sweep]):
    """`fedkd privacy sweep`."""

    config_class = Sweep

    def make_cells(self) -> list[Cell[Entry]]:
        """Each row for each seed; of a release, with fresh noise as often as asked."""
        cells = super().make_cells()
        again = [
            replace(cell, name=f"{cell.name}{_DRAW}{draw}", path=f"{cell.path}-draw{draw}")
            for draw in range(2, self.config.draws + 1)
            for cell in cells
            if _experiment(cell).release is not None
        ]
        return cells + again

    def results(self, folder: Path, found: Found) -> Record:
        """Rows with means and deviations over seeds and draws, and what they promise together."""
        merged: dict[tuple[str, Any], Record] = {}
        for (name, seed), record in found.items():
            row, _, draw = name.partition(_DRAW)
            merged[row, f"{seed}, draw {draw}" if draw else seed] = record
        whole = results(self.config.entries(), merged) | {"promises": self.promises}
        for name, row in whole["rows"].items():
            row["noise"] = spread([self._ahead[name].ratio]) if name in self._ahead else None
        return whole

    @cached_property
    def _ahead(self) -> dict[str, Outlook]:
        """What each private row promises, by its name."""
        return self.config.outlooks()

    @cached_property
    def promises(self) -> str:
        """What all private runs promise together."""
        ahead = self._ahead
        runs = [cell.name.partition(_DRAW)[0] for cell in self.cells]
        return several([ahead[name] for name in runs if name in ahead])


def _experiment(cell: Cell[Entry]) -> Experiment:
    assert isinstance(cell.experiment, Experiment)
    return cell.experiment


def _facts(outcome: Outcome, data: FederatedData, clients: int, has_student: bool) -> Record:
    """What the table needs, as plain values; NaN is null."""
    if not outcome.rounds:
        raise RuntimeError("the method finished without a round")
    best = max(outcome.rounds, key=lambda result: result.accuracy)
    last = next((each for each in outcome.rounds if each.round == outcome.kept), outcome.rounds[-1])
    known = [value for value in outcome.holdouts if value is not None]
    shipped = data.transfer.images.images.numel() * clients if outcome.uses_transfer else 0
    facts = {
        "final": last.accuracy,
        "best": best.accuracy,
        "best_round": best.round,
        "ece": last.ece,
        "worst_client": min(known, default=None),
        "teachers": outcome.teachers,
        "spent": outcome.epsilon,
        "up": sum(result.up for result in outcome.rounds),
        "down": sum(result.down for result in outcome.rounds),
        "transfer": shipped,
        "seconds": sum(result.seconds for result in outcome.rounds),
        "per_class": last.per_class,
        "holdouts": outcome.holdouts,
        "has_student": has_student,
        "classes": data.classes,
        "rounds": [asdict(result) for result in outcome.rounds],
    }
    plain: Record = _plain(facts)
    return plain


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _run_directory(path: Path, experiment: Experiment) -> RunDirectory:
    """The row's run directory; one of another config makes room."""
    config = path / "config.yaml"
    if path.is_dir() and (
        not config.is_file()
        or config.read_text(encoding="utf-8") != experiment.to_yaml()
        or (path / "summary.json").is_file()  # finished, yet asked for again
    ):
        shutil.rmtree(path)
    if not path.is_dir():
        path.mkdir(parents=True)
        write_json(path / "versions.json", versions())
        write_atomically(config, experiment.to_yaml().encode())
    return RunDirectory(path, experiment, path.name)


def _saved(run: RunDirectory, cache: TeacherCache) -> dict[str, float]:
    """Seconds of training taken from the cache, per round, also from before a restart."""
    before = read_json(run.path / "saved.json", dict[str, float]) or {}
    return before | {str(number): spent for number, spent in cache.saved.items()}


def read_run(run: RunDirectory) -> Outcome:
    """What a finished run of fedkd came to, in the terms of a baseline.

    Bytes are those of its messages but for measurement, each counted once: a round done twice
    after an interruption is not the method's cost. Seconds include teachers taken from the cache.
    """
    traffic = _traffic(run.messages(), run.experiment.clients)
    saved = read_json(run.path / "saved.json", dict[str, float]) or {}
    rounds, finished = [], run.events(RoundFinished)
    if all(event.status != "ok" for event in finished):
        raise RuntimeError(f"too few clients answered in every round; {run.path} says why")
    for event in finished:
        spent = sum(value for phase, value in event.seconds.items() if phase != _MEASURED)
        up, down = traffic.get(event.round, (0, 0))
        student = event.student
        rounds.append(
            RoundResult(
                round=event.round,
                accuracy=student.accuracy,
                per_class=[*student.per_class],
                ece=student.calibration.ece if student.calibration else math.nan,
                up=up,
                down=down,
                seconds=spent + saved.get(str(event.round), 0.0),
            )
        )
    judged = holdout_accuracies(run.events(ClientEvaluated))
    holdouts = tuple(judged.get(client) for client in range(run.experiment.clients))
    known = [value for value in finished[-1].teachers.values() if value is not None]
    return Outcome(
        tuple(rounds),
        holdouts,
        teachers=statistics.fmean(known) if known else None,
        epsilon=(run.read_json("privacy.json") or {}).get("worst"),
        kept=kept_round(run.experiment, validated(finished)),
    )


def _traffic(messages: Sequence[MessageCounted], clients: int) -> dict[int, tuple[int, int]]:
    """Round -> (bytes up, bytes down)."""
    described = [message for message in messages if message.phase == "describe"][:clients]
    others = {
        (message.round, message.phase, message.client): message
        for message in messages
        if message.phase not in ("describe", _MEASURED)
    }
    totals: dict[int, tuple[int, int]] = {}
    for message in (*described, *others.values()):
        up, down = totals.get(message.round, (0, 0))
        totals[message.round] = up + message.up, down + message.down
    return totals
