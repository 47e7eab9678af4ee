"""The matrix: teachers are trained once, then a student learns under every rule and attack.

What attackers would send goes through the real checks of the real server, so what is refused
here is refused in a run. Finished cells are kept; a study is gone on with by running it again.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedkd.attacks import ATTACKS
from fedkd.attacks.base import Payload, Scene
from fedkd.attacks.config import AttackStudy
from fedkd.config import Component, Experiment
from fedkd.data.images import ImageSet
from fedkd.io.lock import Lock
from fedkd.io.records import CELL, Damaged, read_json
from fedkd.knowledge.extract import extract
from fedkd.knowledge.kinds import Kind, Logits, VirtualLogits
from fedkd.knowledge.store import write_atomically
from fedkd.knowledge.wire import Refused
from fedkd.randomness import stream, stream_seed
from fedkd.rounds import Client, ExperimentContext, Notify, Server, silent, threads
from fedkd.runs.directory import RunDirectory, network_hash, write_json
from fedkd.runs.signature import keep_images

CLEAN = "clean"
MISLABELLED, COPYCAT = "label_noise", "copycat"


@dataclass(frozen=True)
class Cell:
    """One student to be trained.

    Attributes:
        seed: Of the experiment.
        rule: Label of the fusion chain.
        threat: Label of the attack, or `clean`.
    """

    seed: int
    rule: str
    threat: str


def cells(study: AttackStudy) -> list[Cell]:
    """All cells, those of a seed and a rule together."""
    threats = (CLEAN, *study.threats())
    return [
        Cell(s, rule, threat) for s in study.seeds for rule in study.chains() for threat in threats
    ]


def run_matrix(
    study: AttackStudy, folder: Path, notify: Notify = silent
) -> dict[Cell, dict[str, Any]]:
    """Train what is missing and return every cell's result.

    A result has `accuracy`, `per_class`, `pseudo_labels`, `refused` (reason -> times) and `hash`,
    or `problem` where the rule cannot be used here.

    Args:
        study: Checked.
        folder: Of the study.
        notify: Hears of each teacher and cell.
    """
    todo = cells(study)
    found: dict[Cell, dict[str, Any]] = {}
    with Lock(folder):
        for seed in study.seeds:
            missing = [c for c in todo if c.seed == seed and not _place(study, folder, c).is_file()]
            if missing:
                _run_seed(study, folder, seed, missing, notify, len(todo))
    classes: dict[int, Path] = {}
    for cell in todo:
        place = _place(study, folder, cell)
        found[cell] = read_json(place, CELL)
        if (scores := found[cell].get("per_class")) is not None:
            first = classes.setdefault(len(scores), place)
            if len(classes) > 1:
                other = next(iter(classes.values()))
                raise Damaged(first, f"per_class has {len(scores)} classes, not those of {other}")
    return found


def attackers_of(study: AttackStudy, seed: int) -> tuple[int, ...]:
    """Who attacks: drawn once per seed, the same for all rules and attacks."""
    order = torch.randperm(study.experiment.clients, generator=stream(seed, "attackers"))
    return tuple(sorted(order[: study.num_attackers].tolist()))


# -- teachers --------------------------------------------------------------------------------------


class Answers:
    """What every client would send honestly, and the attackers after training on wrong labels.

    Asked for all that any rule of the study needs; kept on disk, a file per client and round.
    """

    def __init__(self, folder: Path, workspace: ExperimentContext) -> None:
        self.folder = folder
        self.workspace = workspace

    def read(self, round_number: int, client: int, kind: str = "honest") -> Payload:
        """One client's message."""
        with np.load(self._place(round_number, client, kind), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        return Payload({n: a for n, a in arrays.items() if n != "header"},
                       json.loads(str(arrays["header"])))  # fmt: skip

    def make(self, clients: Mapping[str, tuple[int, ...]], rounds: int, notify: Notify) -> None:
        """Train and ask whoever has not answered yet."""
        todo = [(kind, client) for kind, members in clients.items() for client in members]
        for done, (kind, client) in enumerate(todo, start=1):
            space = self.workspace if kind == "honest" else _mislabelled(self.workspace)
            player = Client(space, client, "attack", self.folder / kind / f"client-{client:04d}")
            player.folder.mkdir(parents=True, exist_ok=True)
            for number in range(1, rounds + 1):
                place = self._place(number, client, kind)
                if not place.is_file():
                    player.train(number)
                    arrays, header = player.answer(number)
                    draft = place.with_suffix(".draft.npz")
                    contents: dict[str, Any] = {**arrays, "header": np.array(json.dumps(header))}
                    np.savez(draft, **contents)
                    draft.replace(place)
            notify("teacher", done=done, total=len(todo))

    def _place(self, round_number: int, client: int, kind: str) -> Path:
        return self.folder / kind / f"client-{client:04d}" / f"answer-{round_number:04d}.npz"


def _mislabelled(workspace: ExperimentContext) -> ExperimentContext:
    """The same clients, each class called by the name of the next."""
    source = workspace.data.source
    assert source.labels is not None
    wrong = (source.labels + 1) % len(source.classes)
    other = copy.copy(workspace)
    other.data = replace(workspace.data, source=ImageSet(source.images, wrong, source.classes))
    return other


# -- students --------------------------------------------------------------------------------------


def _run_seed(
    study: AttackStudy, folder: Path, seed: int, missing: list[Cell], notify: Notify, total: int
) -> None:
    chains, threats = study.chains(), study.threats()
    rules = tuple(rule for chain in chains.values() for rule in chain)
    experiment = study.experiment.model_copy(update={"seed": seed})
    attackers = attackers_of(study, seed)
    asked = {"honest": tuple(range(experiment.clients))}
    if any(threat.name == MISLABELLED for threat in threats.values()):
        asked["mislabelled"] = attackers
    union = ExperimentContext(experiment.model_copy(update={"fusion": rules}))
    data = union.data
    keep_images(folder, f"seed {seed}", transfer=data.transfer.images, test=data.test)
    answers = Answers(folder / "teachers" / f"seed{seed}", union)
    with threads(experiment.resources.client_cpus):
        answers.make(asked, experiment.rounds, notify)
    workspace, current = union, ""
    twins: dict[str, dict[str, Any]] = {}
    finished = len(list(folder.glob("cells/*/*/*.json")))
    for done, cell in enumerate(missing, start=finished + 1):
        if cell.rule != current:
            workspace = ExperimentContext(
                experiment.model_copy(update={"fusion": chains[cell.rule]})
            )
            current, twins = cell.rule, {}
        place = _place(study, folder, cell)
        attack = threats.get(cell.threat)
        with threads(experiment.resources.server_threads):
            result = _student(
                workspace,
                answers,
                attackers if attack else (),
                attack,
                place.with_suffix(""),
                twins,
            )
        write_json(place, result)
        notify("cell", done=done, total=total, note=f"{cell.rule} / {cell.threat}")


def _student(
    workspace: ExperimentContext,
    answers: Answers,
    attackers: tuple[int, ...],
    attack: Component | None,
    folder: Path,
    twins: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    """All rounds of one cell in a run directory of its own, which is removed again.

    Args:
        workspace: Of the rule.
        answers: What clients would send honestly.
        attackers: Who attacks.
        attack: How.
        folder: Of the run directory.
        twins: Results of this rule by what was accepted. The same accepted messages make the same
            student: whatever is refused is like silence.
    """
    run = _scratch(folder, workspace.experiment)
    refused: Counter[str] = Counter()
    accepted = hashlib.sha256()
    rounds = range(1, workspace.experiment.rounds + 1)
    # This one answers with the student of the round before, so it cannot be heard beforehand.
    in_turn = attack is not None and attack.name == COPYCAT
    facts = {"attackers": list(attackers)}
    try:
        server = Server(workspace, run)

        def hear(number: int) -> None:
            for client, payload in _messages(server, answers, attackers, attack, number):
                try:
                    arrays, header = _as_ordered(payload, workspace, run.identity)
                    server.accept(client, number, arrays, header)
                except Refused as refusal:
                    refused[str(refusal)] += 1
                else:
                    accepted.update(json.dumps({**header, "run": ""}, sort_keys=True).encode())
                    for name in sorted(arrays):
                        accepted.update(arrays[name].tobytes())

        if not in_turn:
            for number in rounds:
                hear(number)
            if (twin := twins.get(accepted.hexdigest())) is not None:
                return {**twin, **facts, "refused": dict(refused)}
        fused = None
        for number in rounds:
            if in_turn:
                hear(number)
            if server.has_quorum(number):
                fused = server.fuse(number)
                server.learn(number, fused)
            server.finish_round(number)  # what rules remember is kept here
        scores = server.evaluate(rounds[-1], fused)
        result = {
            **{key: scores["student"][key] for key in ("accuracy", "per_class")},
            "pseudo_labels": scores.get("pseudo_labels"),
            "hash": network_hash(server.student),
        }
        twins[accepted.hexdigest()] = result
        return {**result, **facts, "refused": dict(refused)}
    except ValueError as error:  # the rule lacks what it needs: its own words say what
        return {"problem": str(error)}
    finally:
        shutil.rmtree(run.path, ignore_errors=True)


def _messages(
    server: Server,
    answers: Answers,
    attackers: tuple[int, ...],
    attack: Component | None,
    number: int,
) -> Iterator[tuple[int, Payload]]:
    """(client, what it sends) of one round, in client order."""
    clients = range(server.experiment.clients)
    honest = {c: answers.read(number, c) for c in clients if c not in attackers}
    copied = _student_says(server, number) if attack and attack.name == COPYCAT else None
    for client in clients:
        if attack is None or client not in attackers:
            yield client, honest[client]
            continue
        mislabelled = attack.name == MISLABELLED
        seed = server.experiment.seed
        scene = Scene(
            round=number,
            client=client,
            attackers=attackers,
            honest=honest,
            predictions=predictions_of(server.workspace.kinds),
            previous=answers.read(number - 1, client) if number > 1 else None,
            mislabelled=answers.read(number, client, "mislabelled") if mislabelled else None,
            student=copied,
            max_abs=server.experiment.federation.max_abs_logit,
            rng=np.random.default_rng(stream_seed(seed, "attack", attack.name, client, number)),
            shared=np.random.default_rng(stream_seed(seed, "attack", "shared")),
        )
        options = ATTACKS.check(attack.name, attack.options)
        said = ATTACKS.get(attack.name)(answers.read(number, client), scene, **options)
        if said is not None:
            yield client, said


def predictions_of(kinds: tuple[Kind, ...]) -> tuple[str, ...]:
    """Names of the kinds that are logits about images."""
    return tuple(str(kind) for kind in kinds if isinstance(kind, Logits | VirtualLogits))


def _student_says(server: Server, number: int) -> dict[str, np.ndarray] | None:
    """What the student as it stands says about this round's images and views."""
    if number == 1:
        return None
    kinds = tuple(k for k in server.workspace.kinds if isinstance(k, Logits | VirtualLogits))
    views = server.workspace.views(number)
    images = server.workspace.data.transfer.images.images
    told: dict[Kind, Tensor] = extract(server.student, images, kinds, views=views)
    return {str(kind): tensor.cpu().numpy() for kind, tensor in told.items()}


def _as_ordered(
    payload: Payload, workspace: ExperimentContext, run: str
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The message less what this rule would not have asked for, addressed to this run."""
    names = {str(kind) for kind in workspace.kinds}
    disclosed = {name for rule in workspace.fusion for name in rule.discloses}
    unasked = {"num_examples", "class_counts"} - disclosed
    arrays = {name: array for name, array in payload.arrays.items() if name in names}
    header = {key: value for key, value in payload.header.items() if key not in unasked}
    return arrays, {**header, "run": run}


def _scratch(folder: Path, experiment: Experiment) -> RunDirectory:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_atomically(folder / "config.yaml", experiment.to_yaml().encode())
    return RunDirectory(folder, experiment, folder.name)


def _place(study: AttackStudy, folder: Path, cell: Cell) -> Path:
    """File of a cell's result; labels hold characters that file names should not."""
    rule, threat = [*study.chains()].index(cell.rule), cell.threat
    number = 0 if threat == CLEAN else 1 + [*study.threats()].index(threat)
    return folder / "cells" / f"seed{cell.seed}" / f"rule{rule:02d}" / f"attack{number:02d}.json"
