"""What both ends derive from the config alone."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
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
from fedkd.config import Component, ConfigError, Experiment, make_experiment, parse_yaml
from fedkd.data.images import class_map
from fedkd.data.local_shard import LocalShard
from fedkd.data.splits import FederatedData
from fedkd.data.views import virtual_view
from fedkd.distillation.batches import TransferBatches
from fedkd.distillation.objective import Objective
from fedkd.distillation.trainer import rehearse
from fedkd.knowledge.extract import Unreadable, extract, shapes
from fedkd.knowledge.kinds import Kind, Logits, VirtualLogits
from fedkd.knowledge.payload import Bank, Knowledge, Teacher, fuse
from fedkd.knowledge.wire import Expected
from fedkd.models.checks import check_training
from fedkd.models.network import parameter_count
from fedkd.privacy.leaks import check_leaks
from fedkd.privacy.model_check import check_private
from fedkd.privacy.plan import plan
from fedkd.randomness import stream, stream_seed
from fedkd.runs.directory import RunDirectory
from fedkd.runs.images import found_again
from fedkd.training.batches import check_batch_size

# In a reply, before the names of answers about the server's labelled images.
VALIDATION = "validation:"


class ExperimentContext:
    """What both ends derive from the config alone: split, orders, virtual views."""

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
        views = any(isinstance(kind, VirtualLogits) for kind in self.kinds)
        if experiment.federation.subset < 1 and experiment.data.views.refresh and views:
            raise ConfigError(
                "federation.subset: answers kept from earlier rounds are about that round's "
                "virtual views: set data.views.refresh=false"
            )
        self.class_map = class_map(self.data.classes)
        self._test_fingerprint: str | None = None
        self._views: dict[tuple[int, int], Tensor] = {}
        check_leaks(experiment, self.fusion, self.kinds)
        self.plan = plan(experiment)
        self._models, self.largest_network = _describe(
            experiment, self.data, self.objective, self.kinds
        )

    def order(self, run: str, round_number: int, client: int, base: int = 0) -> Expected:
        """What a client is asked to say about the transfer set in this round.

        The server holds its answers of round `base` already, if that is not 0.
        """
        transfer = self.data.transfer
        images = len(transfer.images)
        expected = self._expect(run, round_number, client, self.kinds, transfer.fingerprint, images)
        index = self.asked(round_number) if base > 0 else None
        return replace(expected, base=base, index=index)

    def asked(self, round_number: int) -> np.ndarray | None:
        """Samples that clients already known are asked about in a round, sorted; None for all."""
        share, total = self.experiment.federation.subset, len(self.data.transfer.images)
        if share == 1:
            return None
        drawn = torch.randperm(
            total, generator=stream(self.experiment.seed, "subset", round_number)
        )
        index: np.ndarray = drawn[: max(1, round(share * total))].sort().values.numpy()
        return index

    def test_order(self, run: str, round_number: int, client: int) -> Expected:
        """What a client is asked to say about the test images (for evaluation only)."""
        if self._test_fingerprint is None:
            self._test_fingerprint = self.data.test.fingerprint()
        fingerprint, images = self._test_fingerprint, len(self.data.test)
        return self._expect(run, round_number, client, self.prediction_kinds, fingerprint, images)

    def validation_order(self, run: str, round_number: int, client: int) -> Expected | None:
        """What a client is asked to say about the server's labelled images, if a rule needs it."""
        images = self.data.validation
        if not any(rule.needs_validation for rule in self.fusion) or len(images) == 0:
            return None
        kinds, fingerprint = self.prediction_kinds, images.fingerprint()
        return self._expect(run, round_number, client, kinds, fingerprint, len(images))

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

    def _expect(
        self,
        run: str,
        round_number: int,
        client: int,
        kinds: tuple[Kind, ...],
        fingerprint: str,
        samples: int,
    ) -> Expected:
        model = self._models[self.experiment.teachers.model_of(client)]
        disclose = {name for rule in self.fusion for name in rule.discloses}
        return Expected(
            run=run,
            round=round_number,
            fingerprint=fingerprint,
            class_map=self.class_map,
            num_samples=samples,
            num_classes=len(self.data.classes),
            shapes={kind: model.shapes[kind] for kind in kinds},
            codec=self.codec,
            max_abs=self.experiment.federation.max_abs_logit,
            disclose=tuple(sorted(disclose)),
            parameters=model.parameters,
        )


@dataclass(frozen=True)
class _Model:
    """What is known of a network before it is trained: shapes of what it can say, and its size."""

    shapes: dict[Kind, tuple[int, ...]]
    parameters: int


def _describe(
    experiment: Experiment, data: FederatedData, objective: Objective, asked: tuple[Kind, ...]
) -> tuple[dict[Component, _Model], int]:
    """Every teacher model, tried once, and parameters of the largest network.

    The student and assistants are tried too, so that a misfit is said at once.
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
            told = shapes(network, kinds, data.test.shape)
            black = torch.zeros(2, *data.test.shape, dtype=torch.uint8)
            check_training(network, "it", black, len(data.classes), "the experiment")
        except ValueError as error:
            who = objective.wanting(error.kind) if isinstance(error, Unreadable) else ""
            raise ConfigError(f"{where}: {model.name!r}: {error}{who}") from None
        return _Model(told, parameter_count(network))

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


def workspace(
    config: str, root: str | None = None, own: LocalShard | None = None
) -> ExperimentContext:
    """The workspace of a config (`to_json`), kept: a process answers many messages."""
    return _kept(config, root, own, str(Path.cwd()), os.environ.get("FEDKD_DATA"))


@lru_cache(maxsize=2)
def _kept(
    config: str, root: str | None, own: LocalShard | None, *_where: str | None
) -> ExperimentContext:
    """Relative paths start from `_where` it may be: another folder, other images."""
    return ExperimentContext(make_experiment(parse_yaml(config, "the run's config")), root, own)


def workspace_of(run: RunDirectory, experiment: Experiment | None = None) -> ExperimentContext:
    """The workspace of a run that may have been made elsewhere, with the images it was made with.

    Args:
        run: The run.
        experiment: Its experiment, where that of its config is not meant.

    Raises:
        ConfigError: today's images are others.
        FileNotFoundError: they are missing.
    """
    run.import_plugins()
    config = (experiment or run.experiment).to_json()
    return found_again(run, partial(workspace, config), lambda space: space.data)
