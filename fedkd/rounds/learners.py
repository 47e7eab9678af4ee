"""The networks that learn on the server: assistants, if there are any, and the student."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from fedkd.build import build_optimizer, device_of
from fedkd.distillation.assistants import with_assistant
from fedkd.distillation.batches import TransferBatches
from fedkd.distillation.trainer import EpochRecord, Snapshot, TrainerState, distill
from fedkd.knowledge.extract import extract
from fedkd.knowledge.payload import Fused, Knowledge, Role, Teacher
from fedkd.models.network import Network, parameter_count
from fedkd.randomness import stream_seed
from fedkd.rounds.context import ExperimentContext
from fedkd.rounds.progress import Notify
from fedkd.runs.directory import RunDirectory
from fedkd.runs.events import AssistantEpochFinished, EpochFinished
from fedkd.training.batches import steps_per_epoch

# Below this many steps in a whole run no student has learnt much, which looks like a bug.
FEW_STEPS = 100


@dataclass
class _Learner:
    """A network, and what its last training hands to the next."""

    network: Network
    trainer_state: TrainerState | None = None


class Learners:
    """Assistants and student, in the order in which they learn."""

    def __init__(self, context: ExperimentContext, run: RunDirectory, notify: Notify) -> None:
        self._context = context
        self._experiment = context.experiment
        self._run = run
        self._notify = notify
        self._learners = self._untrained()

    @property
    def student(self) -> Network:
        """The one network that comes out."""
        return self._learners[-1].network

    @property
    def state(self) -> dict[str, object]:
        """For a checkpoint."""
        weights = [
            {name: tensor.cpu() for name, tensor in learner.network.state_dict().items()}
            for learner in self._learners
        ]
        states = [learner.trainer_state for learner in self._learners]
        return {"student": weights[-1], "assistants": weights[:-1], "trainer_states": states}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint's `state`."""
        weights = (*state["assistants"], state["student"])
        states = state["trainer_states"]
        for learner, loaded, trained in zip(self._learners, weights, states, strict=True):
            learner.network.load_state_dict(loaded)
            learner.trainer_state = trained

    def learn(self, round_number: int, fused: Fused) -> None:
        """Distil the fused teachers into the student, by way of the assistants."""
        options = self._experiment.distillation
        steps = options.epochs * steps_per_epoch(len(fused), options.batch_size)
        if round_number == 1 and steps * self._experiment.rounds < FEW_STEPS:
            fewer = " or lower distillation.batch_size" if options.batch_size > 8 else ""
            text = f"the student takes only {steps} steps per round: raise distillation.epochs"
            text += fewer
            self._run.warn(text)
            self._notify("warning", text=text)
        images, views = self._shown(round_number, fused)
        needs = self._context.objective.needs
        if not options.warm_start and round_number > 1:
            self._learners = self._untrained()
        for rank, assistant in enumerate(self._learners[:-1], start=1):
            network = assistant.network
            self._teach(assistant, fused, round_number, "assist", rank)
            size = parameter_count(network)
            who = Teacher(rank, parameters=size, role=Role.ASSISTANT)
            answers = Knowledge(who, extract(network, images, needs, views=views))
            fused = with_assistant(fused, answers, options.assistant_mode, rank)
        self._teach(self._learners[-1], fused, round_number, "learn")

    def _shown(self, round_number: int, fused: Fused) -> tuple[Tensor, Callable[[int], Tensor]]:
        """The transfer images that `fused` is about, and their virtual views."""
        images = self._context.data.transfer.images.images
        views, index = self._context.views(round_number), fused.index
        if index is None:
            return images, views
        return images[index], lambda number: views(number)[index]

    def _teach(self, learner: _Learner, fused: Fused, round_number: int, *names: object) -> None:
        options = self._experiment.distillation
        is_student = learner is self._learners[-1]

        def on_epoch(record: EpochRecord, _snapshot: Snapshot) -> None:
            kind = EpochFinished if is_student else AssistantEpochFinished
            self._run.record(kind(round=round_number, **asdict(record)))
            if is_student:
                self._notify("epoch", round=round_number, epoch=record.epoch, loss=record.loss)

        seed = stream_seed(self._experiment.seed, *names, round_number)
        images, views = self._shown(round_number, fused)
        batches = TransferBatches(
            images,
            fused,
            views=views,
            augment=options.augment,
            batch_size=options.batch_size,
            seed=seed,
            device=learner.network.mean.device,
        )
        _, learner.trainer_state = distill(
            learner.network,
            batches,
            self._context.objective,
            epochs=options.epochs,
            optimizer=build_optimizer(options.optimizer),
            seed=seed,
            on_epoch=on_epoch,
            trainer_state=learner.trainer_state,
        )

    def _untrained(self) -> list[_Learner]:
        device = device_of(self._experiment)
        experiment, context = self._experiment, self._context
        networks = [
            context.network(model, "assistant", rank)
            for rank, model in enumerate(experiment.distillation.assistants, start=1)
        ]
        networks.append(context.network(experiment.student.model, "student"))
        return [_Learner(network.to(device)) for network in networks]
