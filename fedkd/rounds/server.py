"""What the server does in a round."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedkd.build import build_network, build_optimizer, device_of
from fedkd.distillation.assistants import with_assistant
from fedkd.distillation.batches import TransferBatches
from fedkd.distillation.trainer import EpochRecord, Snapshot, distill
from fedkd.fusion.base import Fusion, fit_rules
from fedkd.io.records import Damaged
from fedkd.knowledge.extract import extract
from fedkd.knowledge.kinds import Logits
from fedkd.knowledge.payload import Bank, Fused, Knowledge, Teacher, fuse
from fedkd.knowledge.query import Images, Refused, Reply
from fedkd.knowledge.wire import unpack
from fedkd.models.network import Network, parameter_count
from fedkd.privacy.noise import SecureGenerator
from fedkd.privacy.release.base import Release, Released
from fedkd.privacy.release.gaussian import epsilon_of
from fedkd.randomness import stream, stream_seed
from fedkd.rounds.context import ExperimentContext
from fedkd.rounds.evidence import evidence_of
from fedkd.rounds.progress import Notify, silent
from fedkd.runs.directory import RunDirectory, load_state, network_hash, save_state
from fedkd.runs.events import (
    AnswersReleased,
    AssistantEpochFinished,
    EpochFinished,
    RoundFinished,
)
from fedkd.runs.signature import Signature, keep_signature
from fedkd.training.batches import steps_per_epoch
from fedkd.training.evaluation import Scores, accuracy, evaluate, predict

logger = logging.getLogger(__name__)

# Below this many steps in a whole run no student has learnt much; said, since it looks like a bug.
FEW_STEPS = 100


class Server:
    """The server's half of the round: accept, fuse, distil, evaluate, remember.

    Args:
        workspace: What the config means on this machine.
        run: Where everything is written.
        notify: Hears of progress.
    """

    def __init__(
        self, workspace: ExperimentContext, run: RunDirectory, notify: Notify = silent
    ) -> None:
        self.workspace = workspace
        self.experiment = workspace.experiment
        self.run = run
        self.notify = notify
        signature = Signature.of(self.experiment, workspace.data, workspace.root)
        keep_signature(run, signature)
        self._chain = self._fresh_chain()
        #: The fusion rules as fitted to the last round, and what they remember of it.
        self._rules: list[Fusion] = list(workspace.fusion)
        self._memories: list[dict[str, Tensor]] = []
        self.round = 0
        checkpoint = run.load_checkpoint(run.warn)
        if checkpoint is not None:
            self.round = int(checkpoint["round"])
            states = (*checkpoint["assistants"], checkpoint["student"])
            for learner, state in zip(self._chain, states, strict=True):
                learner.network.load_state_dict(state)
            for learner, learnt in zip(self._chain, checkpoint["learnt"], strict=True):
                learner.learnt = learnt
            self._memories = checkpoint["rules"]

    @property
    def student(self) -> Network:
        """The one network that comes out."""
        return self._chain[-1].network

    # -- accept ----------------------------------------------------------------------------

    def accept(
        self,
        client: int,
        round_number: int,
        asked: Sequence[Images],
        replies: Mapping[Images, Reply],
    ) -> None:
        """Check a client's replies and keep them on disk, all or none. Raises `Refused`."""
        if set(replies) != set(asked):
            raise Refused(f"answers about {_names(replies)} images, asked about {_names(asked)}")
        accepted = [self._checked(client, round_number, each, replies[each]) for each in asked]
        for images, knowledge in zip(asked, accepted, strict=True):
            self.run.knowledge(round_number, images).put(knowledge)

    def _checked(self, client: int, round_number: int, images: Images, reply: Reply) -> Knowledge:
        base = self.held(client, round_number) if images is Images.TRANSFER else 0
        query = self.workspace.query(images, self.run.identity, round_number, client, base)
        held = self.run.knowledge(base).answers(client, query.kinds) if base > 0 else None
        return unpack(reply, query, client, held)

    def held(self, client: int, round_number: int) -> int:
        """The last round before this one whose answer is held from a client; 0 for none.

        Only asked for by codecs that send changes, and where a part of the samples is asked about.
        """
        if not self.workspace.codec.remembers and self.experiment.federation.subset == 1:
            return 0
        earlier = range(round_number - 1, 0, -1)
        return next((n for n in earlier if self._is_held(client, n)), 0)

    def _is_held(self, client: int, round_number: int) -> bool:
        if client not in self.answered(round_number):
            return False
        try:
            self.run.knowledge(round_number).check(client)
        except (Damaged, OSError) as error:  # then it is as if it had not answered
            logger.warning("%s", error)
            return False
        return True

    def recover(self) -> None:
        """Take up the round that was under way when the server ended, if it was killed.

        Half-written answers are removed, and those that the disk lost or changed: these clients
        are asked again.
        """
        number = self.round + 1
        stores = {images: self.run.knowledge(number, images) for images in Images}
        for store in stores.values():
            store.sweep()
        for images, store in stores.items():
            for client in store.clients():
                try:
                    store.check(client)
                except (Damaged, OSError) as error:
                    store.drop(client)
                    if images is Images.VALIDATION:  # comes and goes with those it came with
                        stores[Images.TRANSFER].drop(client)
                    self.warn(
                        f"round {number}: client {client} is asked again, since its answer was "
                        f"lost ({error})"
                    )

    def answered(self, round_number: int) -> list[int]:
        """Clients whose answers about the round's transfer images are held already."""
        return self.run.knowledge(round_number).clients()

    # -- learn -----------------------------------------------------------------------------

    def has_quorum(self, round_number: int) -> bool:
        """Whether enough clients have answered for the round to teach the student."""
        answered = len(self.answered(round_number))
        return (
            answered > 0 and answered >= self.experiment.federation.quorum * self.experiment.clients
        )

    def fuse(self, round_number: int) -> Fused:
        """What the round's teachers say together."""
        store = self.run.knowledge(round_number)
        bank = store.bank(self.workspace.kinds)
        evidence = evidence_of(self.workspace, self.run, round_number, bank, self.student)
        self._rules = fit_rules(self.workspace.fusion, evidence, self._memories)
        if self.workspace.release is not None:
            return self._release(round_number, self.workspace.release, bank, evidence.labels)
        return fuse(bank, self._rules, labels=evidence.labels, store=store.allocate)

    def _release(
        self, round_number: int, release: Release, bank: Bank, labels: Tensor | None
    ) -> Fused:
        """What the mechanism lets out; drawn once, however often the round is taken up again."""
        place = self.run.knowledge(round_number).folder / "released.pt"
        if not place.is_file():
            generator = stream(self.experiment.seed, "queries", round_number)
            index = release.asked(bank.num_samples, generator)
            probabilities = torch.softmax(bank.rows(index, kinds=(Logits(),)).logits, dim=-1)
            out = release(probabilities, index, self.experiment.rounds, SecureGenerator())
            save_state(place, {"scores": out.scores, "index": out.index, "mu": out.mu})
        out = Released(**load_state(place))
        self.run.record(
            AnswersReleased(
                round=round_number,
                mechanism=self.experiment.release.name if self.experiment.release else "",
                answered=len(out.index),
                mu=out.mu,
                epsilon=epsilon_of(out.mu, release.delta),
                delta=release.delta,
                unit=release.unit,
            )
        )
        if len(out.index) < 2:
            raise RuntimeError(
                f"round {round_number}: the release answered {len(out.index)} of the transfer "
                "images; raise its epsilon, lower its threshold, or take more clients"
            )
        crowd = Teacher(self.experiment.clients)
        return Fused.of(
            crowd,
            out.scores.clamp(min=1e-4).log(),
            probabilities=out.scores,
            targets=None if labels is None else labels[out.index],
            index=out.index,
        )

    def learn(self, round_number: int, fused: Fused) -> list[EpochRecord]:
        """Distil the fused teachers into the student."""
        options = self.experiment.distillation
        steps = options.epochs * steps_per_epoch(len(fused), options.batch_size)
        if round_number == 1 and steps * self.experiment.rounds < FEW_STEPS:
            fewer = " or lower distillation.batch_size" if options.batch_size > 8 else ""
            self.warn(
                f"the student takes only {steps} steps per round: raise distillation.epochs{fewer}"
            )
        images, views = self._shown(round_number, fused)
        needs = self.workspace.objective.needs
        if not options.warm_start and round_number > 1:
            self._chain = self._fresh_chain()
        for rank, assistant in enumerate(self._chain[:-1], start=1):
            network = assistant.network
            self._teach(assistant, fused, round_number, "assist", rank)
            who = Teacher(self.experiment.clients + rank, parameters=parameter_count(network))
            told = extract(network, images, needs, views=views)
            fused = with_assistant(fused, Knowledge(who, told), options.guidance, rank)
        return self._teach(self._chain[-1], fused, round_number, "learn")

    def _shown(self, round_number: int, fused: Fused) -> tuple[Tensor, Callable[[int], Tensor]]:
        """The transfer images that `fused` is about, and their virtual views."""
        images = self.workspace.data.transfer.images.images
        views, index = self.workspace.views(round_number), fused.index
        if index is None:
            return images, views
        return images[index], lambda number: views(number)[index]

    def _teach(
        self, learner: _Learner, fused: Fused, round_number: int, *names: object
    ) -> list[EpochRecord]:
        """Distil into one network of the chain."""
        options = self.experiment.distillation
        is_student = learner is self._chain[-1]

        def on_epoch(record: EpochRecord, _snapshot: Snapshot) -> None:
            kind = EpochFinished if is_student else AssistantEpochFinished
            self.run.record(kind(round=round_number, **asdict(record)))
            if is_student:
                self.notify("epoch", round=round_number, epoch=record.epoch, loss=record.loss)

        seed = stream_seed(self.experiment.seed, *names, round_number)
        images, views = self._shown(round_number, fused)
        batches = TransferBatches(
            images,
            fused,
            views=views,
            batch_size=options.batch_size,
            seed=seed,
            device=learner.network.mean.device,
        )
        history, learner.learnt = distill(
            learner.network,
            batches,
            self.workspace.objective,
            epochs=options.epochs,
            optimizer=build_optimizer(options.optimizer),
            seed=seed,
            on_epoch=on_epoch,
            **learner.learnt,
        )
        return history

    # -- evaluate --------------------------------------------------------------------------

    def evaluate(self, round_number: int, fused: Fused | None) -> dict[str, Any]:
        """How good student, teachers and their ensemble are on the public test set."""
        data = self.workspace.data
        labels = data.test.labels
        assert labels is not None
        predictions = predict(self.student, data.test.images)
        facts: dict[str, Any] = {"student": Scores.of(predictions, labels)}
        if len(data.validation) > 0:
            facts["validation"] = evaluate(self.student, data.validation)
        store = self.run.knowledge(round_number, Images.TEST)
        if store.clients():
            bank = store.bank(self.workspace.prediction_kinds)
            facts["teachers"] = {
                teacher.number: accuracy(torch.from_numpy(np.asarray(array, np.float32)), labels)
                for teacher, array in zip(bank.teachers, bank.arrays[Logits()], strict=True)
            }
            if fused is not None and (rules := self._rules_for(round_number, bank)) is not None:
                heard = bank.only(set(self.answered(round_number)))
                together = fuse(heard, rules, store=store.allocate).probabilities
                facts["ensemble"] = Scores.of(together.clamp(min=1e-12).log(), labels)
        if fused is not None and fused.say:
            facts["weights"] = fused.say
        hidden = data.transfer.true_labels
        if fused is not None and hidden is not None:
            shown = hidden if fused.index is None else hidden[fused.index]
            facts["pseudo_labels"] = accuracy(fused.probabilities, shown)
        return facts

    def _rules_for(self, round_number: int, tests: Bank) -> Sequence[Fusion] | None:
        """The round's rules for the teachers that answered the test images as well.

        Rules are fitted to teachers in their order. A client may answer about one set of images
        only, or its other answer be refused: then they are fitted to those who answered both.
        """
        fitted = set(self.answered(round_number))
        clients = fitted & {teacher.number for teacher in tests.teachers}
        if not clients:
            return None
        if clients == fitted:
            return self._rules
        both = self.run.knowledge(round_number).bank(self.workspace.kinds).only(clients)
        evidence = evidence_of(self.workspace, self.run, round_number, both, self.student)
        return fit_rules(self.workspace.fusion, evidence, self._memories)

    def finish_round(self, round_number: int, **facts: Any) -> None:
        """Write the round down and keep the student: the point a resumed run goes on from."""
        self.round = round_number
        self._memories = [rule.state for rule in self._rules]
        event = RoundFinished(round=round_number, hash=network_hash(self.student), **facts)
        self.run.record(event)
        states = [
            {name: tensor.cpu() for name, tensor in learner.network.state_dict().items()}
            for learner in self._chain
        ]
        self.run.save_checkpoint(
            round_number,
            {
                "student": states[-1],
                "assistants": states[:-1],
                "learnt": [learner.learnt for learner in self._chain],
                "rules": self._memories,
            },
        )
        self.notify("round", **event.facts())

    def warn(self, text: str) -> None:
        """Say something that people should know, now and in the report."""
        self.run.warn(text)
        self.notify("warning", text=text)

    def _fresh_chain(self) -> list[_Learner]:
        """Untrained assistants and student."""
        device = device_of(self.experiment)
        experiment, data = self.experiment, self.workspace.data
        networks = [
            build_network(experiment, model, data, "assistant", rank)
            for rank, model in enumerate(experiment.distillation.assistants, start=1)
        ]
        networks.append(build_network(experiment, experiment.student.model, data, "student"))
        return [_Learner(network.to(device)) for network in networks]


@dataclass
class _Learner:
    """A network of the chain, and what its last training hands to the next."""

    network: Network
    learnt: dict[str, Any] = field(default_factory=dict)


def _names(images: Iterable[Images]) -> str:
    return " and ".join(sorted(images)) or "no"
