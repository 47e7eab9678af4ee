"""The matrix: teachers are trained once, then a student learns under every rule and attack.

What attackers would send goes through the real checks of the real server, so what is refused
here is refused in a run.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NotRequired

import numpy as np
from torch import Tensor
from typing_extensions import TypedDict

from fedkd.attacks import ATTACKS
from fedkd.attacks.base import Scene
from fedkd.config import Component, Experiment
from fedkd.data.images import ImageSet
from fedkd.knowledge.extract import extract
from fedkd.knowledge.kinds import Kind, Logits, VirtualLogits
from fedkd.knowledge.query import Images, Query, Refused, Reply
from fedkd.knowledge.store import write_atomically
from fedkd.randomness import stream_seed
from fedkd.rounds import Client, ExperimentContext, Notify, Server, computing, silent
from fedkd.runs.directory import RunDirectory
from fedkd.studies.attack.config import CLEAN, AttackConfig, attackers_of, check_config, resolved
from fedkd.studies.attack.report import table, write
from fedkd.studies.engine import Cell, Found, Record, Study

MISLABELLED, COPYCAT = "label_noise", "copycat"


@dataclass(frozen=True)
class Match:
    """A rule and an attack on it.

    Attributes:
        rule: Label of the fusion chain.
        threat: Label of the attack, or `clean`.
        attack: The attack; None if clean.
    """

    rule: str
    threat: str
    attack: Component | None


class Unusable(TypedDict):
    """A rule that cannot be used, and why."""

    problem: str


class Measured(TypedDict):
    """What came of an attack on a rule."""

    accuracy: float
    per_class: NotRequired[list[float | None] | None]
    refused: dict[str, int]


class AttackStudy(Study[AttackConfig, Match]):
    """A student for every rule, attack and seed.

    A cell gives `accuracy`, `per_class`, `pseudo_labels`, `refused` (reason -> times) and `hash`,
    or `problem` where the rule cannot be used here.
    """

    config_class = AttackConfig
    records = (Unusable, Measured)

    def __init__(self, config: AttackConfig) -> None:
        super().__init__(resolved(config))
        self._given = config
        self._unions: dict[int, ExperimentContext] = {}
        self._rule: tuple[Experiment, ExperimentContext] | None = None
        # Results by what was accepted, of one rule. The same accepted messages make the same
        # student: whatever is refused is like silence.
        self._twins: dict[str, Record] = {}

    def check(self) -> None:
        """Raise `ConfigError` for what cannot be run."""
        check_config(self._given)
        self._all_kinds(self.config.seeds[0])

    def make_cells(self) -> list[Cell[Match]]:
        """Those of a seed and a rule together."""
        threats: dict[str, Component | None] = {CLEAN: None, **self.config.threats()}
        found = []
        for seed in self.config.seeds:
            for row, (rule, chain) in enumerate(self.config.chains().items()):
                experiment = self.config.experiment.model_copy(
                    update={"seed": seed, "fusion": chain}
                )
                for column, (threat, attack) in enumerate(threats.items()):
                    options = {
                        "attack": None if attack is None else attack.model_dump(mode="json"),
                        "attackers": list(attackers_of(self.config, seed)),
                    }
                    # Labels hold characters that file names should not.
                    path = f"cells/seed{seed}/rule{row:02d}/attack{column:02d}"
                    match = Match(rule, threat, attack)
                    name = f"{rule} / {threat}"
                    found.append(Cell(name, seed, path, experiment, match, options))
        return found

    def images(self, seed: int) -> Mapping[str, Mapping[str, ImageSet]]:
        """Each seed has a split of its own."""
        data = self._all_kinds(seed).data
        return {f"seed {seed}": {"transfer": data.transfer.images, "test": data.test}}

    def begin(self, folder: Path, seed: int, notify: Notify) -> None:
        """Train the teachers, and ask them for all that any rule needs."""
        experiment, union = self.config.experiment, self._all_kinds(seed)
        clients = {"honest": tuple(range(experiment.clients))}
        if any(threat.name == MISLABELLED for threat in self.config.threats().values()):
            clients["mislabelled"] = attackers_of(self.config, seed)
        about = experiment.model_dump(mode="json", exclude={"fusion", "name", "output"})
        asked = [*map(str, union.kinds), *union.learning_images]
        key = json.dumps([about, asked], sort_keys=True)
        name = f"seed{seed}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"
        self._answers = Answers(folder / "teachers" / name, union)
        with computing(experiment.resources, experiment.resources.client_cpus):
            self._answers.make(clients, experiment.rounds, notify)

    def run_cell(self, folder: Path, cell: Cell[Match], notify: Notify = silent) -> Record:
        """All rounds of one student, in a run directory that is removed again."""
        experiment, attack = cell.experiment, cell.what.attack
        assert isinstance(experiment, Experiment)
        if self._rule is None or self._rule[0] != experiment:
            self._rule, self._twins = (experiment, ExperimentContext(experiment)), {}
        attackers = () if attack is None else attackers_of(self.config, cell.seed)
        run = _scratch(folder / cell.path, experiment)
        try:
            with computing(experiment.resources, experiment.resources.server_threads):
                server = Server(self._rule[1], run)
                result = _student(server, self._answers, attackers, attack, self._twins)
        except ValueError as error:  # the rule lacks what it needs, and names it
            return {"problem": str(error)}
        finally:
            shutil.rmtree(run.path, ignore_errors=True)
        return {**result, "attackers": list(attackers)}

    def results(self, folder: Path, found: Found) -> Record:
        """Costs by rule and attack, means over the seeds."""
        return table(self.config, found)

    def write(self, folder: Path, results: Record) -> None:
        """The page."""
        write(self.config, results, folder)

    def _all_kinds(self, seed: int) -> ExperimentContext:
        """The federation as if it used all rules at once."""
        if seed not in self._unions:
            rules = tuple(rule for chain in self.config.chains().values() for rule in chain)
            update = {"seed": seed, "fusion": rules}
            self._unions = {
                seed: ExperimentContext(self.config.experiment.model_copy(update=update))
            }
        return self._unions[seed]


@dataclass(frozen=True)
class Answers:
    """What every client would send honestly, and the attackers after training on wrong labels.

    Asked for all that any rule of the study needs; kept on disk, a file per reply.
    """

    folder: Path
    context: ExperimentContext

    def read(
        self, round_number: int, client: int, kind: str = "honest", about: Images = Images.TRANSFER
    ) -> Reply:
        """One client's reply about some images."""
        with np.load(self._place(round_number, client, kind, about), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        header = json.loads(str(arrays.pop("header")))
        return Reply(arrays, header)

    def make(self, clients: Mapping[str, tuple[int, ...]], rounds: int, notify: Notify) -> None:
        """Train and ask whoever has not answered yet."""
        todo = [(kind, client) for kind, members in clients.items() for client in members]
        for done, (kind, client) in enumerate(todo, start=1):
            space = self.context if kind == "honest" else _mislabelled(self.context)
            player = Client(space, client, "attack", self.folder / kind / f"client-{client:04d}")
            player.folder.mkdir(parents=True, exist_ok=True)
            for number, about in itertools.product(range(1, rounds + 1), space.learning_images):
                place = self._place(number, client, kind, about)
                if not place.is_file():
                    player.train(number)
                    reply = player.answer(about, number)
                    header = np.array(json.dumps(reply.header))
                    draft = place.with_suffix(".draft.npz")
                    np.savez(draft, allow_pickle=False, **{**reply.arrays, "header": header})
                    draft.replace(place)
            notify("teacher", done=done, total=len(todo))

    def _place(self, round_number: int, client: int, kind: str, about: Images) -> Path:
        return self.folder / kind / f"client-{client:04d}" / f"{about}-{round_number:04d}.npz"


def _mislabelled(context: ExperimentContext) -> ExperimentContext:
    """The same clients, each class called by the name of the next."""
    source = context.data.source
    assert source.labels is not None
    wrong = (source.labels + 1) % len(source.classes)
    other = copy.copy(context)
    other.data = replace(context.data, source=ImageSet(source.images, wrong, source.classes))
    return other


class _Attacked:
    """The clients of one cell: their replies go to the server, and what is refused is counted."""

    def __init__(
        self, server: Server, answers: Answers, attackers: tuple[int, ...], attack: Component | None
    ) -> None:
        self.refused: Counter[str] = Counter()
        self.accepted = hashlib.sha256()
        self._server = server
        self._answers = answers
        self._attackers = attackers
        self._attack = attack
        # This one answers with the student of the round before, so nothing is received beforehand.
        self.in_turn = attack is not None and attack.name == COPYCAT

    def train(self, round_number: int) -> None:
        """Teachers are trained once for all cells."""

    def answer(self, round_number: int) -> None:
        """Only of those that wait for the student of the round before."""
        if self.in_turn:
            self.receive(round_number)

    def evaluate(self, round_number: int) -> None:
        """Only the student is evaluated."""

    def receive(self, round_number: int) -> None:
        asked = self._server.context.learning_images
        for client, replies in self._replies(round_number):
            try:
                self._server.accept(client, round_number, asked, replies)
            except Refused as refusal:
                self.refused[str(refusal)] += 1
                continue
            for reply in replies.values():
                header = {**reply.header, "run": ""}
                self.accepted.update(json.dumps(header, sort_keys=True).encode())
                for name in sorted(reply.arrays):
                    self.accepted.update(reply.arrays[name].tobytes())

    def _replies(self, number: int) -> Iterator[tuple[int, dict[Images, Reply]]]:
        """(client, its replies) of one round, in client order.

        An attacker lies about the transfer images; about others its own teacher answers.
        """
        context, run = self._server.context, self._server.run.identity
        clients = range(self._server.experiment.clients)
        honest = {c: self._answers.read(number, c) for c in clients if c not in self._attackers}
        copied = _student_answers(self._server, number) if self.in_turn else None
        for client in clients:
            attack = self._attack if client in self._attackers else None
            kind = "mislabelled" if attack and attack.name == MISLABELLED else "honest"
            replies = {
                about: self._answers.read(number, client, kind, about)
                for about in context.learning_images
            }
            if attack is not None:
                scene = self._scene(number, client, attack, honest, copied)
                options = ATTACKS.check(attack.name, attack.options)
                own = self._answers.read(number, client)
                lie = ATTACKS.get(attack.name)(own, scene, **options)
                if lie is None:
                    continue
                replies[Images.TRANSFER] = lie
            queries = {about: context.query(about, run, number, client) for about in replies}
            yield client, {each: _as_asked(replies[each], queries[each]) for each in replies}

    def _scene(
        self,
        number: int,
        client: int,
        attack: Component,
        honest: Mapping[int, Reply],
        copied: Mapping[str, np.ndarray] | None,
    ) -> Scene:
        experiment, read = self._server.experiment, self._answers.read
        seed, mislabelled = experiment.seed, attack.name == MISLABELLED
        return Scene(
            round=number,
            client=client,
            attackers=self._attackers,
            honest=honest,
            predictions=predictions_of(self._server.context.kinds),
            previous=read(number - 1, client) if number > 1 else None,
            mislabelled=read(number, client, "mislabelled") if mislabelled else None,
            student=copied,
            max_abs=experiment.federation.max_abs_logit,
            rng=np.random.default_rng(stream_seed(seed, "attack", attack.name, client, number)),
            shared=np.random.default_rng(stream_seed(seed, "attack", "shared")),
        )


def _student(
    server: Server,
    answers: Answers,
    attackers: tuple[int, ...],
    attack: Component | None,
    twins: dict[str, Record],
) -> Record:
    """All rounds of one cell: the scores of its last student, and what was refused."""
    clients = _Attacked(server, answers, attackers, attack)
    numbers = range(1, server.experiment.rounds + 1)
    if not clients.in_turn:
        for number in numbers:
            clients.receive(number)
        if (twin := twins.get(clients.accepted.hexdigest())) is not None:
            return {**twin, "refused": dict(clients.refused)}
    rounds = [server.run_round(number, clients) for number in numbers]
    pseudo_labels = [each.pseudo_labels for each in rounds if each.status == "ok"]
    result = {
        "accuracy": rounds[-1].student.accuracy,
        "per_class": rounds[-1].student.per_class,
        "pseudo_labels": pseudo_labels[-1] if pseudo_labels else None,
        "hash": rounds[-1].hash,
    }
    twins[clients.accepted.hexdigest()] = result
    return {**result, "refused": dict(clients.refused)}


def predictions_of(kinds: tuple[Kind, ...]) -> tuple[str, ...]:
    """Names of the kinds that are logits about images."""
    return tuple(str(kind) for kind in kinds if isinstance(kind, Logits | VirtualLogits))


def _student_answers(server: Server, number: int) -> dict[str, np.ndarray] | None:
    """What the student as it stands answers about this round's images and views."""
    if number == 1:
        return None
    kinds = tuple(k for k in server.context.kinds if isinstance(k, Logits | VirtualLogits))
    views = server.context.views(number)
    images = server.context.data.transfer.images.images
    found: dict[Kind, Tensor] = extract(server.student, images, kinds, views=views)
    return {str(kind): tensor.cpu().numpy() for kind, tensor in found.items()}


def _as_asked(reply: Reply, query: Query) -> Reply:
    """The reply less what this rule's query does not ask for, addressed to its run."""
    names = {str(kind) for kind in query.kinds}
    unasked = {"num_examples", "class_counts"} - set(query.disclose)
    arrays = {name: array for name, array in reply.arrays.items() if name in names}
    header = {key: value for key, value in reply.header.items() if key not in unasked}
    return Reply(arrays, {**header, "run": query.run})


def _scratch(folder: Path, experiment: Experiment) -> RunDirectory:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_atomically(folder / "config.yaml", experiment.to_yaml().encode())
    return RunDirectory(folder, experiment, folder.name)
