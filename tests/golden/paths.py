"""The paths: a name, and what one training or measurement of it gives.

All on federations of seconds. Each function gets an empty folder and returns value by name.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import fedkd
from fedkd.config import Experiment, make_config, make_experiment
from fedkd.knowledge.codecs import CODECS
from fedkd.losses import LOSSES
from fedkd.privacy.noise import SecureGenerator
from fedkd.privacy.release import RELEASES
from fedkd.rounds import experiment_context
from fedkd.runs.directory import RunDirectory, network_hash
from fedkd.runs.events import RoundFinished
from fedkd.simulations.baselines import BASELINES
from fedkd.simulations.compare.config import Comparison
from fedkd.simulations.compare.study import CompareStudy
from fedkd.simulations.local import run_local
from fedkd.studies import unlearning
from fedkd.studies.attack.config import AttackConfig
from fedkd.studies.attack.study import AttackStudy
from fedkd.studies.audit.study import Options, audit_run
from fedkd.studies.central.config import DistillConfig
from fedkd.studies.central.study import DistillStudy
from fedkd.studies.contribution import contribution
from fedkd.studies.engine import Record, Study, StudyFolder, run_study
from tests.conftest import TINY

Values = dict[str, str]
Walk = Callable[[Path], Values]
PATHS: dict[str, Walk] = {}

# One teacher's network, one round, nothing that measures: the shortest run there is.
SHORT = (
    "teachers.models=[mlp]",
    "fusion=[entropy]",
    "evaluation.baselines=[]",
    "evaluation.teachers=false",
    "evaluation.clients=false",
)


def path(name: str) -> Callable[[Walk], Walk]:
    """Give a path its name."""

    def register(function: Walk) -> Walk:
        PATHS[name] = function
        return function

    return register


def values_of(name: str, folder: Path) -> Values:
    """Go one path: value by name, the path's own name in front."""
    folder.mkdir(parents=True, exist_ok=True)
    return {f"{name}: {key}": value for key, value in PATHS[name](folder).items()}


# -- helpers ---------------------------------------------------------------------------------------


def digest(facts: Any, *without: str) -> str:
    """A hash of plain values, keys that depend on clock and folder left out."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(key): plain(v) for key, v in value.items() if key not in without}
        return [plain(item) for item in value] if isinstance(value, list | tuple) else value

    text = json.dumps(plain(facts), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def experiment(folder: Path, *overrides: str) -> Experiment:
    return make_experiment(TINY, [f"output={folder}", *overrides])


def run(folder: Path, *overrides: str, page: bool = False, **more: Any) -> RunDirectory:
    """The tiny federation; its page is drawn on request, since that takes longer than the run."""
    if page:
        return run_local(experiment(folder, *overrides), **more)
    with mock.patch("fedkd.simulations.job.write_report"):
        return run_local(experiment(folder, *overrides), **more)


def student(folder: Path, *overrides: str, **more: Any) -> str:
    return str(run(folder, *overrides, **more).read_json("summary.json")["hash"])


@contextmanager
def known_noise() -> Iterator[None]:
    """Numbers that nobody could predict come from counted seeds."""
    make, count = SecureGenerator.__init__, itertools.count()

    def seeded(self: SecureGenerator, seed: int | None = None) -> None:
        make(self, next(count) if seed is None else seed)

    with (
        mock.patch.object(SecureGenerator, "__init__", seeded),
        mock.patch("secrets.randbits", side_effect=lambda bits: next(count)),
        mock.patch("fedkd.rounds.context.check_noise"),  # it draws as well
    ):
        yield


# -- runs ------------------------------------------------------------------------------------------


@path("run")
def _runs(folder: Path) -> Values:
    chains = {
        "density_ratio": "fusion=[density_ratio]",
        "consensus, density_ratio": "fusion=[{name: consensus, least: 0.95}, density_ratio]",
        "class_gated, entropy": "fusion=[class_gated, entropy]",
    }
    rest = ("evaluation.baselines=[]",)
    return {name: student(folder, chain, *rest) for name, chain in chains.items()}


@path("run with its options")
def _options(folder: Path) -> Values:
    teachers = (
        "teachers.augment=crop_flip",
        "teachers.label_smoothing=0.1",
        "teachers.warm_start=false",
        "teachers.optimizer={name: sgd, schedule: step, nesterov: true, max_grad_norm: 1.0}",
    )
    server = (
        "data.transfer.labelled=true",
        "data.views.strength=strong",
        "federation.subset=0.5",
        "distillation.warm_start=false",
        "distillation.optimizer={name: adam, warmup: 0.5}",
        "distillation.losses=[{name: ce, warmup: 2}, {name: dkd, start: 2}]",
    )
    return {
        "teachers": student(folder, *SHORT, *teachers),
        "server": student(folder, *SHORT, *server),
    }


@path("run that measures everything")
def _measured(folder: Path) -> Values:
    done = run(folder, page=True)
    found = done.read_json("summary.json")
    scores = ("student", "ensemble", "pseudo_labels", "worst_client", "oracle", "ceiling")
    accuracies = [teacher["accuracy"] for teacher in found["teachers"]]
    of_a_round = ("hash", "status", "answered", "student", "teachers", "ensemble")
    rounds = [
        {key: asdict(record)[key] for key in of_a_round} for record in done.events(RoundFinished)
    ]
    return {
        "summary": digest([*(found[key] for key in scores), accuracies]),
        "rounds": digest(rounds),
        "page": skeleton(done.path / "report.html"),
    }


def skeleton(page: Path) -> str:
    """What a page consists of: its headings, and how many pictures and tables it has."""
    text = page.read_text(encoding="utf-8")
    titles = re.findall(r"<h[123][^>]*>(.*?)</h[123]>", text, re.DOTALL)
    words = [" ".join(re.sub(r"<[^>]+>", "", title).split()) for title in titles]
    counts = [f"{text.count('<' + tag)} {tag}" for tag in ("svg", "table", "details")]
    return f"{', '.join(counts)}; {' | '.join(words)}"


class _Stopped(Exception):
    pass


@path("resume")
def _resume(folder: Path) -> Values:
    def stop(event: str, **facts: Any) -> None:
        if event == "phase" and facts["round"] == 2 and facts["phase"] == "distil":
            raise _Stopped

    begun = RunDirectory.new(experiment(folder, *SHORT))
    try:
        run_local(begun.experiment, run=begun, notify=stop)
    except _Stopped:
        again = RunDirectory.open(begun.path)
        return {"round 2": student(folder, *SHORT, run=again)}
    raise AssertionError("the run was not stopped")


@path("codec")
def _codecs(folder: Path) -> Values:
    fixed = "data.views.refresh=false"
    return {
        name: student(folder, *SHORT, fixed, f"federation.codec={name}") for name in CODECS.names()
    }


@path("release")
def _releases(folder: Path) -> Values:
    short = (*SHORT, "rounds=1", "fusion=[uniform]", "distillation.losses=[ce, kd]")
    found = {}
    for name in RELEASES.names():
        with known_noise():
            few = ", ".join(f"{key}: 3" for key in RELEASES.options(name) if key.startswith("min_"))
            chosen = f"release={{name: {name}, epsilon: 50, {few}}}"
            found[name] = student(folder, *short, chosen)
    return found


@path("privacy")
def _privacy(folder: Path) -> Values:
    budget = "epsilon: 4.0, delta: 0.001, nominal_size: 40, accountant: rdp"
    chosen = {
        "hooks, rdp": budget,
        "ghost, rdp": f"{budget}, clipping: ghost",
        "label_dp": "mechanism: label_dp, epsilon: 2.0",
    }
    found = {}
    for name, privacy in chosen.items():
        with known_noise():
            done = run(folder, *SHORT, f"teachers.privacy={{{privacy}}}")
        facts = done.read_json("privacy.json") or {}
        found[name] = f"{done.read_json('summary.json')['hash']} {digest(facts)}"
    return found


@path("assistants")
def _assistants(folder: Path) -> Values:
    one = (*SHORT, "rounds=1", "distillation.assistants=[{name: cnn_tiny, width: 12}, mlp]")
    return {
        mode: student(folder, *one, f"distillation.assistant_mode={mode}")
        for mode in ("dgkd", "takd")
    }


@path("feedback")
def _feedback(folder: Path) -> Values:
    own = "teachers.models=[{name: cnn_tiny, norm: batch}]"
    return {
        use: student(folder, *SHORT, own, f"teachers.feedback.use={use}")
        for use in ("init", "regulariser", "align")
    }


# -- what is done with a run -----------------------------------------------------------------------


@path("unlearn")
def _unlearn(folder: Path) -> Values:
    whole = run(folder, *SHORT)
    exact = unlearning.prepare(whole, [1])
    server = unlearning.distil_again(exact, experiment_context(exact.experiment))
    quick = unlearning.continue_without(whole, [1], experiment_context(whole.experiment))
    return {"exact": network_hash(server.student), "quick": network_hash(quick.student)}


@path("contribution")
def _contribution(folder: Path) -> Values:
    done = run(folder, *SHORT, "evaluation.teachers=true")
    space = experiment_context(done.experiment)
    return {"all rounds": digest(contribution(done, space, all_rounds=True), "run")}


@path("audit")
def _audit(folder: Path) -> Values:
    done = run(folder, *SHORT, "rounds=1")
    space = experiment_context(done.experiment)
    with known_noise():
        facts = audit_run(done, space, Options(shadows=2, canaries=0))
    return {"shadows": digest(facts, "run", "path", "draw", "white_box")}


# -- studies ---------------------------------------------------------------------------------------


def records(study: Study[Any, Any], folder: Path) -> dict[str, Record]:
    """What came out of each cell."""
    place = StudyFolder.new(study.config, folder)
    run_study(study, place)
    return {cell.name: place.result(cell) or {} for cell in study.cells}


TRAINING = {"epochs": 1, "batch_size": 16, "augment": "crop"}
CENTRAL: dict[str, Any] = {
    "data": {"dataset": {"name": "synthetic", "classes": 3, "size": 8, "per_class": 12}},
    "teachers": {"models": [{"name": "cnn_tiny", "norm": "batch"}], **TRAINING},
    "student": {"model": {"name": "cnn_tiny", "width": 4}},
    "distillation": TRAINING,
    "resources": {"device": "cpu"},
}


def central(folder: Path, methods: Mapping[str, Any], **more: Any) -> Values:
    """Hash of the student of each method."""
    config = make_config(DistillConfig, {"experiment": CENTRAL | more, "methods": methods})
    study = DistillStudy(config)
    study.check()
    with mock.patch("fedkd.studies.central.study.write_report"):
        return {name: record["hash"] for name, record in records(study, folder).items()}


@path("distill")
def _distill(folder: Path) -> Values:
    # Beside the labels, since one epoch of a loss on features alone teaches no classes. Two
    # teachers for the losses that weigh them; three stages for those that match several.
    methods = {name: ["ce", name] for name in LOSSES.names() if name != "ce"}
    model = {"name": "cnn_small", "width": 4, "norm": "batch"}
    teachers = {"models": [model, model], **TRAINING}
    return central(folder, methods, teachers=teachers, student={"model": model})


@path("distill with assistants")
def _central_chain(folder: Path) -> Values:
    between = [{"name": "cnn_tiny", "width": 6}, {"name": "cnn_tiny", "width": 5}]
    return central(
        folder,
        {
            mode: {"distillation.losses": ["ce", "kd"], "distillation.assistant_mode": mode}
            for mode in ("takd", "dgkd")
        },
        distillation={**TRAINING, "assistants": between},
    )


@path("compare")
def _compare(folder: Path) -> Values:
    # Those with LoRA need a file of weights.
    methods = ["fedkd", *(name for name in BASELINES.names() if not name.endswith("_lora"))]
    given = {"experiment": TINY, "methods": methods}
    # Baselines that average weights need the student's network at every client.
    own = ["experiment.teachers.models=[{name: cnn_tiny, norm: batch}]"]
    study = CompareStudy(make_config(Comparison, given, own))
    with mock.patch("fedkd.simulations.job.write_report"):
        rows = [(cell, study.run_cell(folder, cell)) for cell in study.cells]
    clock = ("seconds", "wall", "joules", "multiply_adds")
    # Messages of fedkd hold the path of the client's folder: their size depends on where it runs.
    sizes = ("up", "down")
    return {
        cell.name: digest(row, *clock, *(sizes if cell.what.baseline is None else ()))
        for cell, row in rows
    }


@path("attack")
def _attack(folder: Path) -> Values:
    tiny = experiment(folder, *SHORT).model_dump(mode="json")
    attacks = ["collude", "inflate", "label_noise", "copycat"]
    given = {"experiment": tiny, "rules": ["class_gated"], "attacks": attacks}
    study = AttackStudy(make_config(AttackConfig, given))
    about = ("name", "seed", "settings")
    return {name: digest(record, *about) for name, record in records(study, folder).items()}


# -- Python ----------------------------------------------------------------------------------------


@path("api")
def _api(folder: Path) -> Values:
    train, test = fedkd.load_dataset("synthetic", classes=4, size=8, per_class=30)
    data = fedkd.federate(train, test, clients=2, partition="iid", transfer_size=32, seed=0)
    transfer = data.transfer.images
    shards = [data.shard(client) for client in range(2)]
    teachers = [
        fedkd.train_teacher(fedkd.network("mlp", transfer, seed=n), shard, epochs=2)
        for n, shard in enumerate(shards)
    ]
    learnt = fedkd.train_student("cnn_tiny", teachers, transfer, shards=shards, epochs=2)
    return {"teacher": network_hash(teachers[0]), "student": network_hash(learnt)}
