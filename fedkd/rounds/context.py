"""What both ends derive from the config alone."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedkd.build import (
    build_codec,
    build_data,
    build_fusion,
    build_network,
    build_objective,
    build_release,
    data_root,
)
from fedkd.config import Component, ConfigError, Experiment, read_experiment
from fedkd.data.images import ImageSet, class_map
from fedkd.data.local_shard import LocalShard
from fedkd.data.splits import FederatedData
from fedkd.data.views import virtual_view
from fedkd.distillation.batches import TransferBatches
from fedkd.distillation.objective import Objective
from fedkd.distillation.trainer import rehearse
from fedkd.knowledge.extract import Unreadable, extract, shapes
from fedkd.knowledge.kinds import Kind, Logits, VirtualLogits
from fedkd.knowledge.payload import Bank, Knowledge, Teacher, fuse
from fedkd.knowledge.query import Images, Query
from fedkd.models.checks import check_training
from fedkd.models.network import parameter_count
from fedkd.privacy.leaks import check_leaks
from fedkd.privacy.model_check import check_private
from fedkd.privacy.plan import plan
from fedkd.randomness import stream, stream_seed
from fedkd.runs.directory import RunDirectory
from fedkd.runs.images import found_again
from fedkd.training.batches import check_batch_size


class ExperimentContext:
    """What both ends derive from the config alone: split, queries, virtual views."""

    def __init__(
        self, experiment: Experiment, root: str | Path | None = None, own: LocalShard | None = None
    ) -> None:
        self.experiment = experiment
        #: Where relative data paths start.
        self.root = data_root(experiment, root)
        self.data: FederatedData = build_data(experiment, root, own)
        self.objective = build_objective(experiment)
        self.codec = build_codec(experiment)
        self.fusion = build_fusion(experiment)
        self.release = build_release(experiment)
        #: What clients are asked: for the losses, and for the fusion rules.
        fusion_needs = [kind for rule in self.fusion for kind in rule.needs]
        self.kinds = tuple(dict.fromkeys((*self.objective.needs, *fusion_needs)))
        #: What they are asked about images on which only predictions matter.
        self.prediction_kinds = tuple(dict.fromkeys((Logits(), *fusion_needs)))
        #: The images that clients are asked about before the student learns. The transfer images
        #: come last: with them a client counts as having answered.
        self.learning_images = (
            (Images.VALIDATION, Images.TRANSFER)
            if any(rule.needs_validation for rule in self.fusion) and len(self.data.validation) > 0
            else (Images.TRANSFER,)
        )
        #: Those that they are asked about once it has learnt.
        self.scoring_images = (Images.TEST,) if experiment.evaluation.teachers else ()
        views = any(isinstance(kind, VirtualLogits) for kind in self.kinds)
        if experiment.federation.subset < 1 and experiment.data.views.refresh and views:
            raise ConfigError(
                "federation.subset: answers kept from earlier rounds are about that round's "
                "virtual views: set data.views.refresh=false"
            )
        self.class_map = class_map(self.data.classes)
        self._fingerprints = {Images.TRANSFER: self.data.transfer.fingerprint}
        self._views: dict[tuple[int, int], Tensor] = {}
        check_leaks(experiment, self.fusion, self.kinds)
        self.plan = plan(experiment)
        self._models, self.largest_network = _describe(
            experiment, self.data, self.objective, self.kinds
        )

    @cached_property
    def sent(self) -> bytes:
        """The experiment as it travels to the clients."""
        return self.experiment.to_bytes()

    def query(
        self, images: Images, run: str, round_number: int, client: int, base: int = 0
    ) -> Query:
        """What a client is asked about some of the public images in a round.

        Args:
            images: Which.
            run: Identity of the run.
            round_number: From 1.
            client: Who is asked.
            base: The round whose answers about the transfer images the server holds from this
                client; 0 for none.
        """
        if images not in self._fingerprints:
            self._fingerprints[images] = self.images(images).fingerprint()
        model = self._models[self.experiment.teachers.model_of(client)]
        kinds = self.kinds if images is Images.TRANSFER else self.prediction_kinds
        disclose = {name for rule in self.fusion for name in rule.discloses}
        return Query(
            images=images,
            run=run,
            round=round_number,
            fingerprint=self._fingerprints[images],
            class_map=self.class_map,
            num_samples=len(self.images(images)),
            num_classes=len(self.data.classes),
            shapes={kind: model.shapes[kind] for kind in kinds},
            codec=self.codec,
            max_abs=self.experiment.federation.max_abs_logit,
            disclose=tuple(sorted(disclose)),
            parameters=model.parameters,
            base=base,
            index=self.subset(round_number) if base > 0 else None,
        )

    def images(self, images: Images) -> ImageSet:
        """The images that a query is about."""
        if images is Images.TRANSFER:
            return self.data.transfer.images
        return self.data.validation if images is Images.VALIDATION else self.data.test

    def subset(self, round_number: int) -> np.ndarray | None:
        """Samples that clients already known are asked about in a round, sorted; None for all."""
        share, total = self.experiment.federation.subset, len(self.data.transfer.images)
        if share == 1:
            return None
        drawn = torch.randperm(
            total, generator=stream(self.experiment.seed, "subset", round_number)
        )
        index: np.ndarray = drawn[: max(1, round(share * total))].sort().values.numpy()
        return index

    def views(self, round_number: int) -> Callable[[int], Tensor]:
        """View number -> the transfer images under this round's virtual view."""
        options = self.experiment.data.views
        moment = round_number if options.refresh else 0

        def view(number: int) -> Tensor:
            key = (moment, number)
            if key not in self._views:
                if len(self._views) >= 4:  # a few rounds' views would fill the memory
                    self._views.pop(next(iter(self._views)))
                self._views[key] = virtual_view(
                    self.data.transfer.images.images,
                    seed=stream_seed(self.experiment.seed, "views", moment),
                    view=number,
                    strength=options.strength,
                    flip=options.flip,
                )
            return self._views[key]

        return view


@dataclass(frozen=True)
class _Model:
    """What is known of a network before it is trained: the shapes of its answers, and its size."""

    shapes: dict[Kind, tuple[int, ...]]
    parameters: int


def _describe(
    experiment: Experiment, data: FederatedData, objective: Objective, asked: tuple[Kind, ...]
) -> tuple[dict[Component, _Model], int]:
    """Every teacher model, tried once, and parameters of the largest network.

    The student and assistants are tried too, so that a misfit is refused at once.
    """

    privacy = experiment.teachers.privacy
    looks_private = privacy is not None and privacy.mechanism == "dp_sgd"

    def tried(
        model: Component, kinds: tuple[Kind, ...], where: str, private: bool = False
    ) -> _Model:
        network = build_network(experiment, model, data, "shapes")
        section = "teachers" if where.startswith("teachers") else "distillation"
        size = getattr(experiment, section).batch_size
        try:
            check_batch_size(network, size, f"{section}.batch_size", f"{where} {model.name!r}")
        except ValueError as error:
            raise ConfigError(str(error)) from None
        try:
            if private:
                assert privacy is not None
                classes, shape = len(data.classes), data.test.shape
                check_private(network, shape, classes, name=model.name, clipping=privacy.clipping)
            found = shapes(network, kinds, data.test.shape)
            black = torch.zeros(2, *data.test.shape, dtype=torch.uint8)
            check_training(network, "it", black, len(data.classes), "the experiment")
        except ValueError as error:
            who = objective.wanting(error.kind) if isinstance(error, Unreadable) else ""
            raise ConfigError(f"{where}: {model.name!r}: {error}{who}") from None
        return _Model(found, parameter_count(network))

    both = tuple({*objective.needs, *objective.reads})
    others = [
        tried(assistant, both, "distillation.assistants")
        for assistant in experiment.distillation.assistants
    ]
    others.append(tried(experiment.student.model, objective.reads, "student.model"))
    teachers = {
        model: tried(model, asked, f"teachers.models.{number}", looks_private)
        for number, model in enumerate(experiment.teachers.models)
    }
    if min(experiment.distillation.batch_size, len(data.transfer.images)) == 1:
        _rehearse(experiment, data, objective)
    return teachers, max(model.parameters for model in (*others, *teachers.values()))


def _rehearse(experiment: Experiment, data: FederatedData, objective: Objective) -> None:
    """Whether every loss learns from single images. Raises `ConfigError`."""
    images = data.transfer.images.subset(torch.arange(min(4, len(data.transfer.images))))
    knowledge = [
        Knowledge(
            Teacher(number),
            extract(
                build_network(experiment, model, data, "shapes"),
                images.images,
                objective.needs,
                views=lambda _number: images.images.flip(3),
            ),
        )
        for number, model in enumerate(experiment.teachers.models)
    ]
    fused = fuse(Bank.of(knowledge), [], labels=images.labels)
    batches = TransferBatches(
        images.images,
        fused,
        views=lambda _number: images.images.flip(3),
        batch_size=1,
    )
    student = build_network(experiment, experiment.student.model, data, "shapes", "student")
    try:
        rehearse(student, batches, objective)
    except ValueError as error:
        where = "distillation." if str(error).startswith("batch_size") else "data.transfer."
        raise ConfigError(f"{where}{error}") from None


#: The contexts of this process, the last ones used. Relative paths start from the working directory
#: and FEDKD_DATA, so these are part of the key: another folder holds other images.
_CONTEXTS: OrderedDict[tuple[object, ...], ExperimentContext] = OrderedDict()
_KEPT = 2


def experiment_context(
    experiment: Experiment, root: str | None = None, own: LocalShard | None = None
) -> ExperimentContext:
    """The context of an experiment, made once and kept: a process answers many messages.

    Args:
        experiment: Known by its hash; plugins are imported already.
        root: Folder of local data; overrides `data.root`.
        own: The images of the one client that lives on this machine, where it has no others.

    Raises:
        ConfigError: as `build.check`, or the images cannot be split this way.
        FileNotFoundError: images are missing.
    """
    key = (experiment.hash, root, own, str(Path.cwd()), os.environ.get("FEDKD_DATA"))
    if key not in _CONTEXTS:
        _CONTEXTS[key] = ExperimentContext(experiment, root, own)
        while len(_CONTEXTS) > _KEPT:
            _CONTEXTS.popitem(last=False)
    _CONTEXTS.move_to_end(key)
    return _CONTEXTS[key]


def received_experiment(sent: bytes) -> Experiment:
    """The experiment in a message, without its plugins imported; a known one is not parsed again.

    Raises:
        ConfigError: as `read_experiment`.
    """
    for context in _CONTEXTS.values():
        if context.sent == sent:
            return context.experiment
    return read_experiment(sent, plugins=False)


def context_of_run(run: RunDirectory, experiment: Experiment | None = None) -> ExperimentContext:
    """The context of a run that may have been made elsewhere, with the images it was made with.

    Args:
        run: The run.
        experiment: Its experiment, where that of its config is not meant.

    Raises:
        ConfigError: today's images are others.
        FileNotFoundError: they are missing.
    """
    run.import_plugins()
    make = partial(experiment_context, experiment or run.experiment)
    return found_again(run, make, lambda context: context.data)
