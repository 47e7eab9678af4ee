"""Every row for every seed, one after the other, each written down as it ends."""

from __future__ import annotations

import json
import math
import shutil
import statistics
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from fedkd.build import check
from fedkd.config import ConfigError, Experiment
from fedkd.data.splits import FederatedData
from fedkd.io.records import SHAPES, read_json
from fedkd.knowledge.store import write_atomically
from fedkd.rounds import Interrupted, Notify, experiment_context, silent, threads
from fedkd.runs.directory import RunDirectory, versions, write_json
from fedkd.runs.events import ClientEvaluated, MessageCounted, RoundFinished, holdout_accuracies
from fedkd.runs.signature import keep_images
from simulations.baselines import BASELINES
from simulations.baselines.base import Outcome, RoundResult
from simulations.client_app import make_client_app
from simulations.compare.entries import Entry
from simulations.compare.folder import CompareFolder, Config, Record
from simulations.compare.report import write_report
from simulations.compare.results import results, write_tables
from simulations.compare.teachers import TeacherCache, teachers_key
from simulations.local import run_local
from simulations.machine import check_machine

# Phases of a round that measure and are no part of a method; baselines do not count theirs either.
_MEASURED = "evaluate"


def prepare(config: Config) -> None:
    """Check all rows, and split the images once for each, before a folder exists.

    Raises:
        ConfigError: a name, option or number is wrong, or a loss does not fit the networks.
        FileNotFoundError: images are missing; the message says how to get them.
    """
    seen = set()
    for entry in config.entries():
        experiment = entry.seeded(config.seeds[0])
        if experiment.hash in seen:
            continue
        seen.add(experiment.hash)
        try:
            check(experiment)
            check_machine(experiment, workers=False)
            experiment_context(experiment)
        except ConfigError as error:
            raise ConfigError(f"{entry.name}: {error}") from None


def run_all(folder: CompareFolder, notify: Notify = silent, *, share: bool = True) -> Record:
    """Run what is not finished yet, and write results and report.

    A row that raises is written down with its error, and the others go on.

    Args:
        folder: Where everything is written.
        notify: Hears of progress. What it raises as `Interrupted` ends the work in good order.
        share: Train teachers that are the same for several rows once.

    Returns:
        The results, as in `results.json`.
    """
    with folder.lock:
        return _run_all(folder, notify, share=share)


def _run_all(folder: CompareFolder, notify: Notify, *, share: bool) -> Record:
    for experiment in _splits(folder):
        data = experiment_context(experiment).data
        key = json.dumps([experiment.seed, experiment.data.model_dump(mode="json")])
        keep_images(folder.path, key, transfer=data.transfer.images, test=data.test)
    work = [(entry, seed) for seed in folder.config.seeds for entry in folder.entries]
    for number, (entry, seed) in enumerate(work):
        label = f"{entry.name}, seed {seed}"
        notify("row", label=label, done=number, total=len(work))
        if folder.is_finished(entry, seed):
            continue
        try:
            facts = run_entry(folder, entry, seed, notify, share=share)
        except Interrupted:
            raise
        except Exception as error:  # one method's fault must not cost the night's other results
            said = f"{type(error).__name__}: {error}".splitlines()[0]
            facts = {"error": said, "traceback": traceback.format_exc()}
        folder.finish(entry, seed, facts)
        notify("row_done", label=label, **facts)
        write_json(folder.path / "results.json", results(folder))
    notify("row", label="report", done=len(work), total=len(work))
    return write_all(folder)


def _splits(folder: CompareFolder) -> list[Experiment]:
    """One experiment for every way in which rows of the first seed take their images."""
    found: dict[str, Experiment] = {}
    for entry in folder.entries:
        experiment = entry.seeded(folder.config.seeds[0])
        found.setdefault(experiment.data.model_dump_json(), experiment)
    return list(found.values())


def write_all(folder: CompareFolder) -> Record:
    """Write results, tables and report from what is there, and return the results."""
    found = results(folder)
    write_json(folder.path / "results.json", found)
    write_tables(folder, found)
    write_report(folder, found)
    return found


def run_entry(
    folder: CompareFolder, entry: Entry, seed: int, notify: Notify = silent, *, share: bool = True
) -> Record:
    """One row for one seed: rounds, verdicts of the clients, bytes, seconds."""
    experiment = entry.seeded(seed)
    started = time.perf_counter()
    space = experiment_context(experiment)
    if entry.baseline is None:
        outcome = _run_fedkd(folder, entry, seed, notify, share=share)
        has_student = True
    else:
        rounds = experiment.rounds

        def on_round(result: RoundResult) -> None:
            notify("round", round=result.round, rounds=rounds, accuracy=result.accuracy)

        baseline = BASELINES.create(entry.baseline.name, **entry.baseline.options)
        with threads(experiment.resources.server_threads):
            outcome = baseline.run(space, on_round)
        has_student = baseline.has_student
    wall = time.perf_counter() - started
    return _facts(outcome, space.data, experiment.clients, has_student) | {"wall": wall}


def _facts(outcome: Outcome, data: FederatedData, clients: int, has_student: bool) -> Record:
    """What the table needs, as plain values; NaN is null."""
    if not outcome.rounds:
        raise RuntimeError("the method finished without a round")
    last, best = outcome.rounds[-1], max(outcome.rounds, key=lambda result: result.accuracy)
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


# -- fedkd -----------------------------------------------------------------------------------------


def _run_fedkd(
    folder: CompareFolder, entry: Entry, seed: int, notify: Notify, *, share: bool
) -> Outcome:
    """The real path of `fedkd run --runner local`, from its last checkpoint if it has one."""
    run = _run_directory(folder, entry, seed)
    experiment = run.experiment
    cache, key = None, teachers_key(experiment)
    if share and key is not None:
        cache = TeacherCache(folder.teachers / key)

    def hear(event: str, **facts: Any) -> None:
        if event == "round":
            accuracy, number = facts["student"]["accuracy"], facts["round"]
            if cache is not None:
                write_json(run.path / "saved.json", _saved(run, cache))
            notify("round", round=number, rounds=experiment.rounds, accuracy=accuracy)
        elif event != "done":
            notify(event, **facts)

    app = make_client_app([] if cache is None else [cache])
    run_local(experiment, run=run, notify=hear, client_app=app)
    outcome = read_run(run)
    shutil.rmtree(run.path / "knowledge")  # megabytes per round, and the report is written
    return outcome


def _run_directory(folder: CompareFolder, entry: Entry, seed: int) -> RunDirectory:
    """The row's run directory; one of another config makes room."""
    path, experiment = folder.run_path(entry, seed), entry.seeded(seed)
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
    before = read_json(run.path / "saved.json", SHAPES["saved.json"]) or {}
    return before | {str(number): spent for number, spent in cache.saved.items()}


def read_run(run: RunDirectory) -> Outcome:
    """What a finished run of fedkd came to, in the terms of a baseline.

    Bytes are those of its messages but for measurement, each counted once: a round done twice
    after an interruption is not the method's cost. Seconds include teachers taken from the cache.
    """
    traffic = _traffic(run.messages(), run.experiment.clients)
    saved = read_json(run.path / "saved.json", SHAPES["saved.json"]) or {}
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
