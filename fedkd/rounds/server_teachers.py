"""Teachers that the server has itself, from files: published networks, zero-shot classifiers.

Nobody trains them. Their answers join those of the clients before the fusion rules look, as if one
more client had sent them, and are ordinary knowledge for every loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary, proxy

import torch

from fedkd.build import build_network, check_model, device_of
from fedkd.config import Component, ConfigError
from fedkd.io.tensors import file_hash
from fedkd.knowledge.extract import Unreadable, extract, shapes
from fedkd.knowledge.kinds import DataStatistic, Kind, Logits, VirtualLogits
from fedkd.knowledge.payload import Bank, Knowledge, Role, Teacher
from fedkd.knowledge.query import Images
from fedkd.models.entries import files_of
from fedkd.models.hub import HF
from fedkd.models.network import Network, parameter_count
from fedkd.rounds.context import ExperimentContext
from fedkd.training.evaluation import accuracy


class ServerTeachers:
    """The networks of `teachers.server`, and their answers.

    Args:
        context: Of the experiment, whose `weights` are told of the files.

    Raises:
        ConfigError: a network that is not there whole, or does not go with losses and rules.
    """

    def __init__(self, context: ExperimentContext) -> None:
        self._context: ExperimentContext = proxy(context)  # which outlives this
        models = context.experiment.teachers.server
        if models:
            _check_rules(context)
        self._networks = [self._begun(n, model) for n, model in enumerate(models)]
        self._known: dict[Images, tuple[int, Bank]] = {}

    def __len__(self) -> int:
        return len(self._networks)

    def beside(self, bank: Bank, images: Images, round_number: int) -> Bank:
        """The clients' knowledge and theirs, who come last.

        Args:
            bank: The clients', before fusion.
            images: What it is about.
            round_number: Of the virtual views.
        """
        return bank.beside(self._bank(images, round_number)) if self._networks else bank

    def accuracies(self) -> list[float]:
        """Of each on the test images."""
        labels = self._context.data.test.labels
        if not self._networks or labels is None:
            return []
        answers = self._bank(Images.TEST, 0).arrays[Logits()]
        return [accuracy(torch.from_numpy(logits), labels) for logits in answers]

    def _bank(self, images: Images, round_number: int) -> Bank:
        context = self._context
        transfer = images is Images.TRANSFER
        kinds = context.kinds if transfer else context.prediction_kinds
        moves = transfer and context.experiment.data.views.refresh
        moment = round_number if moves and any(isinstance(k, VirtualLogits) for k in kinds) else 0
        known = self._known.get(images)
        if known is None or known[0] != moment:
            views = context.views(round_number) if transfer else None
            seen = context.images(images, None).images
            answers = [
                Knowledge(
                    Teacher(
                        context.experiment.clients + number,
                        parameters=parameter_count(network),
                        role=Role.SERVER,
                    ),
                    extract(network, seen, kinds, views=views),
                )
                for number, network in enumerate(self._networks)
            ]
            known = self._known[images] = moment, Bank.of(answers)
        return known[1]

    def _begun(self, number: int, model: Component) -> Network:
        context, where = self._context, f"teachers.server.{number}"
        if "peft" in model.options:
            raise ConfigError(f"{where}.peft: nothing of it is trained; take peft out")
        if "weights" not in model.options and not model.name.startswith(HF):
            raise ConfigError(
                f"{where}: {model.name!r} is trained by nobody: set {where}.weights to a file, or "
                "leave it out"
            )
        check_model(model, where)
        try:
            network = build_network(
                context.experiment,
                model,
                context.data,
                "server",
                number,
                root=context.root,
                notify=context.remarks.append,
                whole=True,
            )
            shapes(network, context.kinds, context.data.test.shape)
        except Unreadable as error:
            wanting = context.objective.wanting(error.kind)
            raise ConfigError(f"{where}: {model.name!r}: {error}{wanting}") from None
        except ValueError as error:
            raise ConfigError(f"{where}: {error}") from None
        for name, path in files_of(model.name, model.options, context.root).items():
            context.weights[name] = file_hash(path)
        return network.to(device_of(context.experiment)).eval()


_MADE: WeakKeyDictionary[ExperimentContext, ServerTeachers] = WeakKeyDictionary()


def server_teachers_of(context: ExperimentContext) -> ServerTeachers:
    """Those of an experiment, read once: only where they are needed, which is the server.

    Raises:
        ConfigError: as `ServerTeachers`.
    """
    if context not in _MADE:
        _MADE[context] = ServerTeachers(context)
    return _MADE[context]


def _check_rules(context: ExperimentContext) -> None:
    """Refuse rules that look at private images: these teachers have none."""
    for number, rule in enumerate(context.fusion):
        if rule.discloses or _of_images(rule.needs):
            name = context.experiment.fusion[number].name
            raise ConfigError(
                f"fusion.{number}: {name!r} weighs teachers by their private images, and those of "
                "teachers.server have none; take uniform, entropy, energy or another rule that "
                "looks at answers alone"
            )
    needs = _of_images(context.objective.needs)
    if needs:
        raise ConfigError(
            f"distillation.losses: {needs[0]} is found in private images, and the teachers of "
            "teachers.server have none; leave out that loss"
        )


def _of_images(kinds: Sequence[Kind]) -> list[Kind]:
    return [kind for kind in kinds if isinstance(kind, DataStatistic)]
