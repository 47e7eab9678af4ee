"""What both ends derive from the config alone."""

from __future__ import annotations

import copy
import os
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import compress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedkd.build import build_data, build_network, build_pair, build_teacher, check, data_root
from fedkd.config import Component, ConfigError, Experiment, read_experiment
from fedkd.data.cohorts import Cohort, draw_cohort, how_many
from fedkd.data.images import ImageSet, class_map
from fedkd.data.labels import class_places
from fedkd.data.local_shard import LocalShard
from fedkd.data.splits import FederatedData
from fedkd.data.views import virtual_view
from fedkd.distillation.batches import TransferBatches
from fedkd.distillation.trainer import rehearse
from fedkd.io.tensors import file_hash
from fedkd.knowledge.extract import Unreadable, extract, shapes
from fedkd.knowledge.kinds import Kind, Logits, VirtualLogits
from fedkd.knowledge.payload import Bank, Knowledge, Teacher, fuse
from fedkd.knowledge.query import Images, Query
from fedkd.models.checks import check_training
from fedkd.models.entries import files_of
from fedkd.models.network import Network, parameter_count
from fedkd.privacy.leaks import check_leaks
from fedkd.privacy.model_check import check_private
from fedkd.privacy.noise_check import check_noise
from fedkd.privacy.plan import plan
from fedkd.privacy.release.cells import Cells
from fedkd.privacy.release.secure import SecureSum
from fedkd.randomness import stream, stream_seed
from fedkd.runs.directory import RunDirectory
from fedkd.runs.images import found_again
from fedkd.training.batches import check_batch_size
from fedkd.training.detection import uneven


class ExperimentContext:
    """What both ends derive from the config alone: split, queries, virtual views.

    Args:
        experiment: The experiment.
        root: Folder of local data; overrides `data.root`.
        own: The images of the one client that lives on this machine, where it has no others.
        node: The one client whose network is used on this machine: files of weights that only
            others begin with need not be here. None: all are.
    """

    def __init__(
        self,
        experiment: Experiment,
        root: str | Path | None = None,
        own: LocalShard | None = None,
        node: int | None = None,
    ) -> None:
        self.experiment = experiment
        self._node = node
        parts = check(experiment)
        self.objective, self.fusion = parts.objective, parts.fusion
        self.codec, self.release = parts.codec, parts.release
        self._sampler = parts.sampler
        #: Where relative data paths start.
        self.root = data_root(experiment, root)
        self.data: FederatedData = build_data(experiment, root, own)
        self.objective.heads = self.data.heads
        self._fresh: dict[tuple[object, ...], Network] = {}
        #: Files of weights that were read here, as the config names them -> SHA-256.
        self.weights: dict[str, str] = {}
        #: What people should know of these files.
        self.remarks: list[str] = []
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
        scoring = (Images.TEST, Images.SOURCES) if self.data.source_tests else (Images.TEST,)
        self.scoring_images = scoring if experiment.evaluation.teachers else ()
        views = any(isinstance(kind, VirtualLogits) for kind in self.kinds)
        if experiment.federation.subset < 1 and experiment.data.views.refresh and views:
            raise ConfigError(
                "federation.subset: answers kept from earlier rounds are about that round's "
                "virtual views: set data.views.refresh=false"
            )
        self.cohort(1)
        if experiment.federation.stale.keep > 0 and experiment.data.views.refresh and views:
            raise ConfigError(
                "federation.stale.keep: old answers are about the virtual views of their round: "
                "set data.views.refresh=false, or leave out the losses that ask for VirtualLogits"
            )
        self.class_map = class_map(self.data.classes)
        self._knows = self._known_classes()
        self._fingerprints: dict[tuple[str, Images], str] = {}
        self._views: dict[tuple[int, int], Tensor] = {}
        check_leaks(experiment, self.fusion, self.kinds)
        self.plan = plan(experiment)
        #: How many cells of the transfer images a release asks about; None: about single images.
        self.cells = self._count_cells()
        self._try_sum()
        self._models = self._try_models()
        if self.plan is not None:
            check_noise(self.plan.mechanism)
        #: Parameters of the largest network.
        self.largest_network = max(model.parameters for model in self._models.values())
        if min(experiment.distillation.batch_size, len(self.data.transfer.images)) == 1:
            self._rehearse()

    def network(
        self, model: Component, *names: object, classes: tuple[str, ...] | None = None
    ) -> Network:
        """An untrained network, whose weights are drawn from the run seed's stream `names`.

        Those that the context has tried are copies of one: building takes longer than copying.
        """
        fresh = self._fresh.get((model, *names))
        if fresh is None or classes is not None:
            return self._built(model, *names, classes=classes)
        return copy.deepcopy(fresh)

    def _built(
        self, model: Component, *names: object, classes: tuple[str, ...] | None = None
    ) -> Network:
        build = build_teacher if names[:1] == ("teacher",) else build_network
        data = self._seen_by(*names)
        return build(self.experiment, model, data, *names, root=self.root, classes=classes)

    def pair(self, client: int) -> tuple[Network, Network | None]:
        """A client's untrained network, and its partner where labels are noisy."""
        model, data = self.experiment.teachers.model_of(client), self.data.of(client)
        return build_pair(self.experiment, model, data, "teacher", client, root=self.root)

    def network_with(
        self, model: Component, weights: Mapping[str, Tensor], client: int | None = None
    ) -> Network:
        """A trained network. Raises `RuntimeError` if these are not the weights of such a one.

        Args:
            model: What it is.
            weights: Its own.
            client: Whose it is; None: the server's.
        """
        seen = self.data if client is None else self.data.of(client)
        if client is not None and (own := self.own(client)) is not None:
            network = self.network(model, "teacher", client, classes=own)
            network.load_state_dict(dict(weights))
            return network
        # A client's may be a pair of networks.
        known = (
            key[1:]
            for key in self._fresh
            if key[0] == model and (key[1] == "teacher") == (client is not None)
        )
        names = next((names for names in known if self._seen_by(*names) is seen), None)
        if names is None:
            names = ("student",) if client is None else ("teacher", client)
        network = self.network(model, *names)
        network.load_state_dict(dict(weights))
        return network

    def _seen_by(self, *names: object) -> FederatedData:
        """The data as the network of this name sees them."""
        if len(names) == 2 and names[0] == "teacher" and isinstance(names[1], int):
            return self.data.of(names[1])
        return self.data

    def knows(self, client: int) -> tuple[bool, ...] | None:
        """Which of the classes a client's teacher knows; None: all."""
        return None if self._knows is None else self._knows[client]

    def own(self, client: int) -> tuple[str, ...] | None:
        """Names of the classes that a client's teacher knows; None: all."""
        knows = self.knows(client)
        return None if knows is None else tuple(compress(self.data.classes, knows))

    def _known_classes(self) -> list[tuple[bool, ...]] | None:
        """Which classes each client knows. Raises `ConfigError`."""
        if (heads := self.data.heads) is not None:
            return [heads.knows(head) for head in self.experiment.heads]
        if (known := self.experiment.teachers.classes) is None:
            return None
        names, where = self.data.classes, "teachers.classes"
        try:
            found = [
                class_places(chosen, names, f"{where}.{client}")
                for client, chosen in enumerate(known)
            ]
            for client, knows in enumerate(found):
                if not self.data.seen_by or self.data.seen_by[client] in self.data.sides:
                    held = self.data.of(client).held_by(client)
                    held.among(knows, f"{where}.{client}: client {client}")
        except ValueError as error:
            raise ConfigError(str(error)) from None
        for name, row in zip(names, zip(*found)):
            if not any(row):
                raise ConfigError(f"{where}: nobody knows class {name!r}; list it for a client")
        return found

    def _count_cells(self) -> int | None:
        """Raises `ConfigError`: there are not so many images."""
        if self.release is None or self.release.cells is None:
            return None
        experiment, images = self.experiment, len(self.data.transfer.images)
        asked = how_many(experiment.federation.participation.ask, experiment.clients)
        classes = len(self.data.classes)
        count = self.release.how_many_cells(asked, experiment.rounds, classes, images)
        if count > images:
            raise ConfigError(
                f"release.cells: {count} cells of {images} transfer images: take fewer, or raise "
                "data.transfer.size"
            )
        return count

    @cached_property
    def transfer_cells(self) -> Cells | None:
        """The cells that a release asks about; None: it asks about images, or there is none."""
        if self.cells is None:
            return None
        images, classes = self.data.transfer.images.images, len(self.data.classes)
        return Cells.among(images, self.cells, classes, self.experiment.seed)

    @property
    def sums_securely(self) -> bool:
        """Whether clients answer by masked votes alone."""
        return self.experiment.sums_securely

    @property
    def shared_kinds(self) -> tuple[Kind, ...]:
        """What leaves a client, as it is."""
        return () if self.sums_securely else self.kinds

    def questions(self, round_number: int) -> Tensor:
        """The transfer images that a release without cells asks about in a round, ascending."""
        assert self.release is not None
        total = len(self.data.transfer.images)
        return self.release.asked(total, stream(self.experiment.seed, "queries", round_number))

    @cached_property
    def round_sum(self) -> SecureSum:
        """What the secure sum of a round takes."""
        cells = self.transfer_cells
        return self.secure_sum(len(self.questions(1)) if cells is None else len(cells))

    def secure_sum(self, questions: int) -> SecureSum:
        """What a secure sum about so many images or cells takes."""
        assert self.release is not None
        experiment = self.experiment
        asked = how_many(experiment.federation.participation.ask, experiment.clients)
        classes = len(self.data.classes)
        return SecureSum.of(self.release, asked, experiment.rounds, questions, classes)

    def _try_sum(self) -> None:
        """Raises `ConfigError`: a secure sum cannot be made."""
        if self.sums_securely:
            try:
                self.secure_sum(self.cells or len(self.questions(1)))
            except ValueError as error:
                raise ConfigError(f"release.{error}") from None

    @cached_property
    def detects(self) -> bool:
        """Whether it is measured how well each class is found (`evaluation.detection`)."""
        choice, labels = self.experiment.evaluation.detection, self.data.test.labels
        if self.data.heads is not None:
            return False
        if choice == "auto":
            return labels is not None and uneven(labels)
        return choice == "on"

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
        asked = self.images(images, client)
        seen = self.data.of(client)
        if (seen.modality, images) not in self._fingerprints:
            whole = images is Images.TRANSFER
            found = seen.transfer.fingerprint if whole else asked.fingerprint()
            self._fingerprints[seen.modality, images] = found
        model = self._model(client)
        kinds = self.kinds if images is Images.TRANSFER else self.prediction_kinds
        disclose = {name for rule in self.fusion for name in rule.discloses}
        return Query(
            images=images,
            run=run,
            round=round_number,
            fingerprint=self._fingerprints[seen.modality, images],
            class_map=class_map(self.own(client) or self.data.classes),
            num_samples=len(asked),
            num_classes=len(self.data.classes),
            shapes={kind: model.shapes[kind] for kind in kinds},
            codec=self.codec,
            max_abs=self.experiment.federation.max_abs_logit,
            disclose=tuple(sorted(disclose)),
            parameters=model.parameters,
            base=base,
            knows=self.knows(client),
            index=self.subset(round_number) if base > 0 else None,
        )

    def cost(self, client: int) -> int:
        """Of training a client's teacher beside others': samples x parameters of its network."""
        return self.data.shard_size(client) * self._model(client).parameters

    def architecture(self, client: int) -> tuple[Component, str, int | None]:
        """What those that train together have in common: model, what it sees, number of classes."""
        model, seen = self.experiment.teachers.model_of(client), self.data.of(client).modality
        own = self.own(client)
        return model, seen, None if own is None else len(own)

    def _model(self, client: int) -> _Model:
        """What is known of a client's network."""
        return self._models["teacher", *self.architecture(client)]

    def images(self, images: Images, client: int | None) -> ImageSet:
        """The images that a query is about, as the client sees them; None: as the student does."""
        data = self.data if client is None else self.data.of(client)
        if images is Images.TRANSFER:
            return data.transfer.images
        if images is Images.SOURCES:
            return self._source_tests
        return data.validation if images is Images.VALIDATION else data.test

    @cached_property
    def _source_tests(self) -> ImageSet:
        """The test images in each source domain, one set after the other."""
        tests = self.data.source_tests
        return replace(
            self.data.test,
            images=torch.cat([test.images for test in tests]),
            labels=torch.cat([test.labels for test in tests if test.labels is not None]),
        )

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

    def cohort(self, round_number: int, there: Collection[int] | None = None) -> Cohort:
        """Whom a round asks of the clients that are there; None: all of them.

        Raises:
            ConfigError: the sampler cannot do with this experiment.
        """
        options = self.experiment.federation.participation
        try:
            return draw_cohort(
                self._sampler,
                clients=self.experiment.clients,
                ask=options.ask,
                spare=options.spare,
                there=there,
                seed=self.experiment.seed,
                round_number=round_number,
                sizes=self._sizes,
                elastic=options.start is not None,
            )
        except ValueError as error:
            raise ConfigError(f"federation.participation.sampler: {error}") from None

    def _sizes(self) -> list[int]:
        """Images of each client. Raises `ValueError` where only the clients know."""
        if self.experiment.promises or self.experiment.data.public is not None:
            raise ValueError(
                f"{self.experiment.federation.participation.sampler.name!r} needs to know how many "
                "images each client has, which they keep to themselves here; give them as `sizes`"
            )
        return [self.data.shard_size(client) for client in range(self.experiment.clients)]

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

    @property
    def has_student(self) -> bool:
        """Whether this machine has what the student sees: a node has its own side of pairs."""
        return not self.data.sides or self.data.modality == "+".join(
            self.experiment.student.modality
        )

    def _try_models(self) -> dict[tuple[object, ...], _Model]:
        """What is known of every network that is dealt, by its role and `architecture`."""
        experiment, reads = self.experiment, self.objective.reads
        both = tuple({*self.objective.needs, *reads})
        found: dict[tuple[object, ...], _Model] = {}
        seen = self.data.modality
        if self.has_student:
            for rank, model in enumerate(experiment.distillation.assistants, start=1):
                found["assistant", model, seen] = self._tried(model, both, "assistant", rank)
            student = experiment.student.model
            found["student", student, seen] = self._tried(student, reads, "student")
        models, seen_by = experiment.teachers.models, self.data.seen_by
        # Where all see and know the same, the first clients have every network that there is.
        many = experiment.clients if seen_by or self._knows else len(models)
        for number in range(min(many, experiment.clients)):
            if seen_by and seen_by[number] not in self.data.sides:
                continue
            key = ("teacher", *self.architecture(number))
            if key not in found:
                model, own = experiment.teachers.model_of(number), self.own(number)
                found[key] = self._tried(model, self.kinds, "teacher", number, own=own)
        return found

    def _tried(
        self,
        model: Component,
        kinds: tuple[Kind, ...],
        *names: object,
        own: tuple[str, ...] | None = None,
    ) -> _Model:
        """Try a network on images as these, and keep it untrained. Raises `ConfigError`."""
        experiment, data = self.experiment, self._seen_by(*names)
        teaches = names[0] == "teacher"
        section = "teachers" if teaches else "distillation"
        where = _KEYS.get(str(names[0]), "")
        if teaches:
            assert isinstance(names[1], int)
            where = f"teachers.models.{names[1] % len(experiment.teachers.models)}"
        used = (
            self._node is None
            or (teaches and model == experiment.teachers.model_of(self._node))
            # What the server sends of it is what has been learnt beside its file.
            or (names[0] == "student" and "peft" in model.options)
        )
        fresh = self._begun(model, data, where, *names, load=used, classes=own)
        if own is None:
            self._fresh[(model, *names)] = fresh
        network = copy.deepcopy(fresh)
        size = (experiment.teachers if teaches else experiment.distillation).batch_size
        privacy = experiment.teachers.privacy if teaches else None
        shape, classes = data.test.shape, len(own or data.classes)
        try:
            check_batch_size(network, size, f"{section}.batch_size", f"{where} {model.name!r}")
        except ValueError as error:
            raise ConfigError(str(error)) from None
        try:
            if privacy is not None and privacy.mechanism == "dp_sgd":
                check_private(network, shape, classes, name=model.name, clipping=privacy.clipping)
            found = shapes(network, kinds, shape)
            black = torch.zeros(2, *shape, dtype=torch.uint8)
            check_training(network, "it", black, classes, "the experiment")
        except ValueError as error:
            who = self.objective.wanting(error.kind) if isinstance(error, Unreadable) else ""
            raise ConfigError(f"{where}: {model.name!r}: {error}{who}") from None
        return _Model(found, parameter_count(network))

    def _begun(
        self,
        model: Component,
        data: FederatedData,
        where: str,
        *names: object,
        load: bool,
        classes: tuple[str, ...] | None,
    ) -> Network:
        """A network as it begins, and what its file is. Raises `ConfigError`."""
        try:
            build = build_teacher if names[0] == "teacher" else build_network
            network = build(
                self.experiment,
                model,
                data,
                *names,
                root=self.root,
                notify=self.remarks.append,
                load=load,
                classes=classes,
            )
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None
        noisy = self.experiment.teachers.noisy if names[0] == "teacher" else None
        partner = None if noisy is None else noisy.partner.model
        for each in (model,) if partner is None else (model, partner):
            for name, path in files_of(each.name, each.options, self.root).items() if load else ():
                self.weights[name] = file_hash(path)
        return network

    def _rehearse(self) -> None:
        """Whether every loss learns from single images. Raises `ConfigError`."""
        if not self.has_student:
            return
        few = torch.arange(min(4, len(self.data.transfer)))
        images = self.data.transfer.images.subset(few)

        def views(_number: int) -> Tensor:
            return images.images.flip(3)

        needs, models = self.objective.needs, self.experiment.teachers.models
        knowledge = []
        for number, model in enumerate(models):
            # More models than clients are tried too, as if the first client had them.
            client = number if number < self.experiment.clients else 0
            pictures = self.data.of(client).transfer.images.subset(few).images
            network = self._built(model, "teacher", client)
            knowledge.append(
                Knowledge(Teacher(number), extract(network, pictures, needs, views=views))
            )
        fused = fuse(Bank.of(knowledge), [], labels=images.labels)
        batches = TransferBatches(images.images, fused, views=views, batch_size=1)
        student = self.network(self.experiment.student.model, "student")
        try:
            rehearse(student, batches, self.objective)
        except ValueError as error:
            where = "distillation." if str(error).startswith("batch_size") else "data.transfer."
            raise ConfigError(f"{where}{error}") from None


# Keys of the networks of the server.
_KEYS = {"student": "student.model", "assistant": "distillation.assistants"}


@dataclass(frozen=True)
class _Model:
    """What is known of a network before it is trained: the shapes of its answers, and its size."""

    shapes: dict[Kind, tuple[int, ...]]
    parameters: int


#: The contexts of this process, the last ones used. Relative paths start from the working directory
#: and FEDKD_DATA, so these are part of the key: another folder holds other images.
_CONTEXTS: OrderedDict[tuple[object, ...], ExperimentContext] = OrderedDict()
_KEPT = 2


def experiment_context(
    experiment: Experiment,
    root: str | None = None,
    own: LocalShard | None = None,
    node: int | None = None,
) -> ExperimentContext:
    """The context of an experiment, made once and kept: a process answers many messages.

    Args:
        experiment: Known by its hash; plugins are imported already.
        root: Folder of local data; overrides `data.root`.
        own: The images of the one client that lives on this machine, where it has no others.
        node: The one client that lives on this machine.

    Raises:
        ConfigError: as `build.check`, or the images cannot be split this way.
        FileNotFoundError: images are missing.
    """
    key = (experiment.hash, root, own, node, str(Path.cwd()), os.environ.get("FEDKD_DATA"))
    if key not in _CONTEXTS:
        _CONTEXTS[key] = ExperimentContext(experiment, root, own, node)
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
