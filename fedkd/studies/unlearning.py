"""Taking clients out of a finished run: their knowledge, and everything the student had of it.

A run keeps every client's answers of every round, so the student can be distilled once more
without some of them. That is exact: it is the student of a run in which they never answered. The
teachers of the others do not know the student unless `teachers.feedback` gives it to them.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedkd.config import ConfigError, one_head
from fedkd.io.records import read_json
from fedkd.knowledge.kinds import Logits
from fedkd.knowledge.query import Images
from fedkd.losses.subset_kd import subset_kd_loss
from fedkd.rounds import ExperimentContext, Notify, Server, computing, silent
from fedkd.runs.directory import RunDirectory, Session, network_hash
from fedkd.runs.events import ClientsAsked, ClientsErased, OldAnswersCounted, RoundFinished
from fedkd.runs.export import load_student
from fedkd.runs.quarantine import strikes
from fedkd.runs.results import Lineage
from fedkd.runs.signature import keep_signature, read_signature
from fedkd.training.evaluation import accuracy, per_class_accuracy, predict

LINEAGE, EVIDENCE = "lineage.json", "unlearning.json"


def finished_rounds(run: RunDirectory) -> list[int]:
    """Rounds in which somebody answered. Raises `ConfigError` if the knowledge of one is gone."""
    finished = run.events(RoundFinished)
    rounds = [each.round for each in finished if run.knowledge(each.round).folder.is_dir()]
    missing = [each.round for each in finished if each.answered and each.round not in rounds]
    if not rounds and not missing:
        raise ConfigError(f"{run.path} has no finished round in which a client answered")
    if missing:
        raise ConfigError(
            f"{run.path}: the knowledge of round {missing[0]} is gone (knowledge/ of the run); "
            "distilling again needs that of every round"
        )
    return rounds


def check_removal(run: RunDirectory, without: Collection[int], *, influenced: bool = False) -> None:
    """Raise `ConfigError` if these clients cannot be taken out of the run.

    Args:
        run: The finished run.
        without: Clients to take out.
        influenced: Accept that the other teachers learnt from a student that knew them.
    """
    one_head(run.experiment.student, "a removal", f"{run.path}: student.heads")
    rounds = finished_rounds(run)
    clients = range(run.experiment.clients)
    if unknown := sorted(set(without) - set(clients)):
        raise ConfigError(f"--client {unknown[0]}: this run's clients are 0 to {clients[-1]}")
    if not without or set(without) >= set(clients):
        raise ConfigError("--client: name at least one client, and leave at least one")
    if run.experiment.release is not None:
        raise ConfigError(
            f"release {run.experiment.release.name!r}: distilling again would draw the mechanism "
            "again and spend the privacy budget of the clients who stay a second time"
        )
    federation = run.experiment.federation
    if federation.mode == "buffered":
        raise ConfigError(
            "federation.mode 'buffered': when an answer arrived is not known any more. Run the "
            "experiment again without these clients"
        )
    if federation.stale.keep and federation.quarantine.after is not None and strikes(run):
        raise ConfigError(
            "federation.stale: whose old answers counted depended on strikes that distilling again "
            "does not see. Run the experiment again without these clients"
        )
    use = run.experiment.teachers.feedback.use
    if use != "none" and rounds[-1] > 1 and not influenced:
        raise ConfigError(
            f"teachers.feedback.use is {use!r}: from round 2 the other clients' teachers learnt "
            "from a student that knew these clients, so distilling again does not remove them "
            "entirely. Run the experiment again without them, or accept it with --influenced"
        )


def prepare(
    run: RunDirectory, without: Collection[int], parent: Path | None = None
) -> RunDirectory:
    """A new run directory that holds the run's knowledge less some clients', and its lineage.

    One that was begun before is taken up again. Files are linked where the disk allows it.

    Args:
        run: The finished run.
        without: Clients to take out.
        parent: Folder of the new run; default: beside the run.
    """
    run.import_plugins()
    parent = parent or run.path.parent
    lineage: Lineage = {"source": run.identity, "without": sorted(without), "mode": "exact"}
    if (begun := _find(run, parent, lineage)) is not None:
        return begun
    # The baselines are measures beside the student: the new run takes them from the old one.
    evaluation = run.experiment.evaluation.model_copy(update={"baselines": ()})
    experiment = run.experiment.model_copy(update={"evaluation": evaluation})
    new = RunDirectory.new(experiment, parent)
    _copy_signature(run, new)
    _copy_cohorts(run, new)
    for round_number in finished_rounds(run):
        _copy_knowledge(run, new, round_number, without)
    new.write_json(LINEAGE, lineage)
    return new


def distil_again(run: RunDirectory, context: ExperimentContext, notify: Notify = silent) -> Server:
    """Every round of `run` (from `prepare`) from the knowledge it holds; goes on where it ended."""
    with (
        Session(run) as session,
        computing(run.experiment.resources, run.experiment.resources.server_threads),
    ):
        server = Server(context, run, notify)
        run.rewind(server.round)
        for number in [r for r in _rounds_held(run) if r > server.round]:
            server.run_round(number)
            session.note()
        server.keep()
    return server


def continue_without(
    run: RunDirectory,
    without: Collection[int],
    context: ExperimentContext,
    notify: Notify = silent,
    parent: Path | None = None,
) -> Server:
    """The approximate way: the run's last student learns the last round again, without them.

    What it took over from these clients in its weights is written over, not removed.
    """
    run.import_plugins()
    checkpoint = run.load_checkpoint()
    if checkpoint is None:
        raise ConfigError(f"{run.path} has no checkpoint to go on from")
    new = RunDirectory.new(run.experiment, parent or run.path.parent)
    _copy_signature(run, new)
    _copy_cohorts(run, new)
    last = int(checkpoint["round"])
    _copy_knowledge(run, new, last, without)
    # What rules remember of earlier rounds was measured on these clients too.
    new.save_checkpoint(last, {**checkpoint, "rules": []})
    new.write_json(LINEAGE, {"source": run.identity, "without": sorted(without), "mode": "quick"})
    with Session(new), computing(new.experiment.resources, new.experiment.resources.server_threads):
        server = Server(context, new, notify)
        server.run_round(last)
    return server


def find_exact(run: RunDirectory, without: Collection[int]) -> RunDirectory | None:
    """A finished exact removal of these clients beside the run."""
    lineage: Lineage = {"source": run.identity, "without": sorted(without), "mode": "exact"}
    found = _find(run, run.path.parent, lineage)
    return found if found is not None and (found.path / EVIDENCE).is_file() else None


class Evidence(Lineage):
    """What `unlearning.json` holds: how students differ, and how far they follow who left."""

    hash: str
    influenced: bool
    students: dict[str, dict[str, Any]]
    opinions: dict[int, Mapping[str, Any]]


def evidence(
    run: RunDirectory,
    server: Server,
    without: Collection[int],
    *,
    exact: RunDirectory | None = None,
) -> Evidence:
    """What the removal changed, as plain values; also written to `unlearning.json`.

    Args:
        run: The run that knew the clients.
        server: After `distil_again` or `continue_without`.
        without: The clients taken out.
        exact: The exact removal, to measure an approximate one against.
    """
    context, new = server.context, server.run
    data = context.data
    labels = data.test.labels
    assert labels is not None
    students = {"before": load_student(run, data), "after": server.student.cpu().eval()}
    if exact is not None:
        students["exact"] = load_student(exact, data)
    on_test = {name: predict(student, data.test.images) for name, student in students.items()}
    images = data.transfer.images.images
    on_transfer = {name: predict(student, images) for name, student in students.items()}
    lineage: Lineage = new.read_json(LINEAGE)
    facts: Evidence = {
        **lineage,
        "hash": network_hash(server.student),
        # With feedback the others' teachers learnt from a student that knew these clients.
        "influenced": run.experiment.teachers.feedback.use != "none" and server.round > 1,
        "students": {
            name: {
                "accuracy": accuracy(logits, labels),
                "per_class": per_class_accuracy(logits, labels),
                "agrees_with_after": float(
                    (logits.argmax(1) == on_test["after"].argmax(1)).double().mean()
                ),
            }
            for name, logits in on_test.items()
        },
        "opinions": {
            client: compared
            for client in sorted(without)
            if (compared := _opinions(run, context, client, without, on_transfer)) is not None
        },
    }
    new.write_json(EVIDENCE, facts)
    return facts


def _opinions(
    run: RunDirectory,
    context: ExperimentContext,
    client: int,
    without: Collection[int],
    students: dict[str, Tensor],
) -> Mapping[str, Any] | None:
    """How far each student still follows a client's answers of its last round.

    `follows` is the share of images on which the student names the client's class where those who
    stay name another; `divergence` is the mean KL(client || student). Membership of the client
    shows in the student's being closer to it than a student that never learnt from it.
    """
    held = [r for r in _rounds_held(run) if client in run.knowledge(r).clients()]
    if not held:
        return None
    bank = run.knowledge(held[-1]).bank((Logits(),))
    answers = {
        teacher.number: torch.from_numpy(teacher.widened(array.astype("float32")))
        for teacher, array in zip(bank.teachers, bank.arrays[Logits()], strict=True)
    }
    stay = [logits.softmax(1) for number, logits in answers.items() if number not in without]
    if not stay:
        return None
    own = answers[client]
    dissent = own.argmax(1) != torch.stack(stay).mean(0).argmax(1)
    table: dict[str, Any] = {"round": held[-1], "dissents_on": int(dissent.sum())}
    for name, logits in students.items():
        same = (logits.argmax(1) == own.argmax(1))[dissent]
        table[name] = {
            "follows": float(same.double().mean()) if len(same) else None,
            # Among the classes that the client knows.
            "divergence": float(subset_kd_loss(logits, own, temperature=1.0).mean()),
        }
    return table


def erasable(run: RunDirectory, without: Collection[int]) -> list[Path]:
    """What of a run was made by or with these clients: their knowledge and teachers, what was
    fused of it, students since they first answered, and files made of those students."""
    found: list[Path] = []
    first: int | None = None
    old = [event for event in run.events(OldAnswersCounted) if set(without) & event.clients.keys()]
    counted = {f"round-{event.round:04d}" for event in old}
    for folder in sorted((run.path / "knowledge").glob("round-*")):
        for images in Images:
            own = [folder / images / f"client-{client:04d}" for client in sorted(without)]
            own = [place for place in own if place.is_dir()]
            found += own
            if (own or folder.name in counted) and (folder / images / "fused").is_dir():
                found.append(folder / images / "fused")
            if own and images is Images.TRANSFER and first is None:
                first = int(folder.name.removeprefix("round-"))
    found += [p for c in sorted(without) if (p := run.client(c)).is_dir()]
    if first is not None:
        found += [
            path
            for path in sorted((run.path / "checkpoints").glob("round-*.pt"))
            if int(path.stem.removeprefix("round-")) >= first
        ]
        found += sorted(run.path.glob("student.*"))  # exported
        found += [p for p in (run.path / "contribution", run.path / "inspect") if p.is_dir()]
    return found


def tainted(run: RunDirectory, without: Collection[int]) -> list[RunDirectory]:
    """Runs beside this one that were made from it and still hold something of these clients.

    Those that only lack others hold their knowledge; quick ones went on from a student of theirs.
    """
    found = []
    for file in sorted(run.path.parent.glob(f"*/{LINEAGE}")):
        lineage = read_json(file, Lineage)
        assert lineage is not None
        clean = lineage["mode"] == "exact" and set(lineage["without"]) >= set(without)
        if lineage["source"] == run.identity and not clean:
            found.append(RunDirectory.open(file.parent))
    return found


def erase(run: RunDirectory, paths: Iterable[Path], without: Collection[int]) -> None:
    """Delete what `erasable` found, and write down that it was done."""
    erased = []
    with run.lock:
        for path in paths:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
            erased.append(str(path.relative_to(run.path)))
    run.record(ClientsErased(clients=sorted(without), paths=erased))
    run.warn(
        f"clients {', '.join(map(str, sorted(without)))} were erased from this run; its metrics "
        "still record what happened, its students are gone. Do not resume it."
    )


def _rounds_held(run: RunDirectory) -> list[int]:
    return sorted(
        int(path.name.removeprefix("round-")) for path in (run.path / "knowledge").glob("round-*")
    )


def _copy_signature(run: RunDirectory, new: RunDirectory) -> None:
    """Where the images are, and what the networks take: the same for the new run."""
    signature = read_signature(run)
    if signature is not None:
        keep_signature(new, signature)


def _copy_cohorts(run: RunDirectory, new: RunDirectory) -> None:
    """A quorum is one of the clients that a round asked: of the same ones, without some or not."""
    for event in run.events(ClientsAsked):
        new.record(event)


def _copy_knowledge(
    run: RunDirectory, new: RunDirectory, round_number: int, without: Collection[int]
) -> None:
    left_out = {f"client-{client:04d}" for client in without} | {"fused"}
    for images in Images:
        source = run.knowledge(round_number, images).folder
        target = new.knowledge(round_number, images).folder
        target.mkdir(parents=True)
        for place in sorted(source.glob("client-*")):
            if place.name not in left_out:
                shutil.copytree(place, target / place.name, copy_function=_link)


def _link(source: str, target: str) -> None:
    """Accepted knowledge is never written again, so two runs may share its bytes."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _find(run: RunDirectory, parent: Path, lineage: Lineage) -> RunDirectory | None:
    for file in sorted(parent.glob(f"*/{LINEAGE}")):
        if read_json(file, Lineage) == lineage:
            return RunDirectory.open(file.parent, trust=run.trusted)
    return None
