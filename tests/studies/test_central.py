"""Studies: teachers in the loop, several methods and seeds, from config to page."""

import json
import re
import shutil
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from PIL import Image

from fedkd.config import ConfigError, load_config, make_config
from fedkd.data.datasets import load_dataset
from fedkd.data.images import ImageSet
from fedkd.data.label_noise import with_label_noise
from fedkd.distillation.batches import OnlineBatches
from fedkd.io.tensors import file_hash, load_state
from fedkd.knowledge.kinds import Logits
from fedkd.models.build import build_model
from fedkd.rounds import Interrupted, silent
from fedkd.runs.export import export_student, predict_files
from fedkd.studies.central.config import DistillConfig
from fedkd.studies.central.folder import Place
from fedkd.studies.central.report import methods_table
from fedkd.studies.central.study import DistillStudy, chain
from fedkd.studies.central.training import Images, load_trained
from fedkd.studies.engine import Record, StudyFolder, present, results_of, run_study
from fedkd.training.evaluation import calibration, predict

TRAINING = {"epochs": 2, "batch_size": 16, "augment": "crop", "virtual": "randaugment"}
EXPERIMENT: dict[str, Any] = {
    "data": {"dataset": {"name": "synthetic", "classes": 3, "size": 8, "per_class": 20}},
    "teachers": {"models": [{"name": "cnn_tiny", "norm": "batch"}], **TRAINING},
    "student": {"model": {"name": "cnn_tiny", "width": 4}},
    "distillation": TRAINING,
    "resources": {"device": "cpu"},
}
METHODS = {"kd": ["ce", "kd"], "vrm": ["ce", "vrm"]}
TINY = {"name": "tiny", "experiment": EXPERIMENT, "methods": METHODS}


def study(*overrides: str, **values: Any) -> DistillStudy:
    """The tiny study; `distillation.` and `teachers.` are keys of its experiment."""
    sections = ("data.", "teachers.", "student.", "distillation.", "resources.")
    words = [f"experiment.{w}" if w.startswith(sections) else w for w in overrides]
    return DistillStudy(make_config(DistillConfig, {**TINY, **values}, words))


def both(word: str) -> tuple[str, str]:
    """A key of how teachers and students are trained."""
    return f"teachers.{word}", f"distillation.{word}"


class Done:
    """A study and its folder."""

    def __init__(self, study: DistillStudy, parent: Path) -> None:
        self.study = study
        self.folder = StudyFolder.new(study.config, parent)
        self.path = self.folder.path

    def run(self, notify: Any = silent) -> Record:
        return run_study(self.study, self.folder, notify)

    def again(self) -> "Done":
        """The same folder, opened as another process does."""
        done = object.__new__(Done)
        done.folder = StudyFolder.open(self.path, DistillConfig)
        done.study, done.path = DistillStudy(done.folder.config), self.path
        return done

    @property
    def results(self) -> Record:
        return results_of(self.study, self.folder)

    def student(self, method: str, seed: int) -> Place:
        return Place.of_student(self.path, method, seed)

    def page(self) -> str:
        present(self.study, self.folder)
        return (self.path / "report.html").read_text(encoding="utf-8")


@pytest.fixture
def unreported(monkeypatch: pytest.MonkeyPatch) -> None:
    """No page: drawing one takes seconds."""
    monkeypatch.setattr("fedkd.studies.central.study.write_report", lambda *_: None)


@pytest.fixture
def run(tmp_path: Path, unreported: None) -> Callable[..., Done]:
    """`run("seeds=[0,1]")`: the tiny study with overrides, run in a folder of its own."""

    def go(*overrides: str, notify: Any = silent, **values: Any) -> Done:
        done = Done(study(*overrides, **values), tmp_path)
        done.study.check()
        assert done.run(notify)["errors"] == {}
        return done

    return go


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Done:
    done = Done(study("seeds=[0,1]"), tmp_path_factory.mktemp("studies"))
    done.run()
    return done


# -- configs ---------------------------------------------------------------------------------------


def test_a_resolved_study_reads_back_as_itself() -> None:
    config = study(methods={"kd": {"distillation.losses": "kd", "distillation.epochs": 3}}).config
    assert make_config(DistillConfig, config.model_dump(mode="json")) == config


def test_a_base_holds_where_a_file_has_nothing(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(
        "experiment:\n  teachers: {models: resnet20}\n"
        "  distillation: {epochs: 9, optimizer: {lr: 0.3}}\n"
        "  student: {model: {name: cnn_tiny, width: 8}}\nmethods: {kd: [kd], vrm: [vrm]}\n"
    )
    (tmp_path / "mine.yaml").write_text(
        "base: base.yaml\nexperiment: {distillation: {epochs: 4}, student: {model: {name: mlp}}}\n"
        "methods: {vrm: null, dkd: dkd}\n"
    )
    config = load_config(DistillConfig, tmp_path / "mine.yaml")
    options = config.experiment.distillation
    assert (config.name, options.epochs, options.optimizer.lr) == ("mine", 4, 0.3)
    assert list(config.runs()) == ["student", "kd", "dkd"]
    assert config.experiment.student.model.options == {}
    (tmp_path / "base.yaml").write_text("base: mine.yaml\n")
    with pytest.raises(ConfigError, match=r"base: .*mine\.yaml is this file's own base"):
        load_config(DistillConfig, tmp_path / "mine.yaml")
    (tmp_path / "mine.yaml").write_text("experiment: {base: nothing.yaml}\n")
    with pytest.raises(ConfigError, match=r"experiment: base: .*nothing\.yaml does not exist"):
        load_config(DistillConfig, tmp_path / "mine.yaml")


def test_a_method_changes_the_distillation_and_the_rest_is_the_studys() -> None:
    runs = study(
        "distillation.optimizer.lr=0.5",
        "distillation.epochs=7",
        methods={"kd": {"distillation.losses": "kd", "distillation.epochs": 3}},
    ).runs
    assert runs["kd"].distillation.epochs == 3
    assert runs["kd"].distillation.optimizer.lr == 0.5
    assert runs["student"].distillation.epochs == 7


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("only=kdd", "only: there is no method 'kdd'; did you mean 'kd'?"),
        ("distillation.epoch=3", "distillation.epoch: unknown key; did you mean 'epochs'?"),
        ("recipe.epochs=3", "recipe: is now experiment.distillation"),
        ("teachers_per_seed=true", "is now experiment.teachers.per_seed"),
        ("teachers.0.recipe={epochs: 3}", "experiment.teachers"),
        ("methods={kd: {distillation.epoch: 3}}", "methods.kd: distillation.epoch: unknown key;"),
        ("methods={kd: {losses: kd}}", "methods.kd.losses: a method changes keys of the"),
        ("methods={kd: {recipe: {epochs: 1}}}", "write distillation.KEY"),
        ("methods={kd: {data.train: 3}}", "methods.kd: data.train is the same for all methods"),
        ("teachers.epochs=x", "experiment.teachers.epochs: input should be a valid int"),
        ("teachers.train=[1,2]", "train: expected one for each of 1 models"),
        ("methods.kd=[kdd]", "distillation.losses.0: unknown loss 'kdd'; did you mean 'kd'?"),
        ("methods.kd=[{name: kd, temprature: 2}]", "has no option 'temprature'; did you mean 'te"),
        ("methods={a/b: kd}", "methods.a/b"),
        ("methods.kd=[ce, {name: kd, stop: 1}]", ""),
        ("methods.kd=[{name: kd, start: 2}]", "no loss counts in epoch 1 of 2"),
        ("student.model=resnet2", "student.model: unknown model 'resnet2'; did you mean 'resnet"),
        ("distillation.assistants=[resnt8]", "assistants.0: unknown model 'resnt8'; did you mean"),
        ("distillation.augment=cropp", "augment: unknown augmentation 'cropp'; did you mean"),
        ("teachers.checkpoints=[no.pt]", "teachers.checkpoints.0: there is no file no.pt"),
        ("data.train=61", "data.train: 61 images are asked for, there are 60"),
        ("teachers.train=61", "teachers.train: 61 images are asked for, there are 60"),
        (
            "methods={x: {name: fitnet, stage: 2}}",
            "methods.x: stage(index=2) cannot be read from teacher 0: it has",
        ),
        ("data.label_noise={kind: pair}", "experiment.data.label_noise.rate: kind 'pair' needs"),
        (
            "data.label_noise={kind: pair, rate: 0.5, clients: 0.5}",
            "experiment.data: label_noise.clients: a study has none, got 0.5; leave it out",
        ),
        (
            "data.label_noise={kind: asymmetric, rate: 0.5}",
            "experiment.data: label_noise.kind: 'asymmetric' knows the similar classes of",
        ),
        ("resources.device=cuda:99", "resources.device: 'cuda:99' is not usable here"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_trained(word: str, expected: str) -> None:
    if not expected:
        study(word).check()
        return
    with pytest.raises(ConfigError) as caught:
        study(word).check()
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_everybody_learns_the_given_labels_and_the_page_counts_the_wrong_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = "data.label_noise={kind: pair, rate: 0.5}"
    words = (*both("epochs=1"), "only=kd")
    clean, noisy = Done(study(*words), tmp_path), Done(study(*words, noise), tmp_path)
    assert "wrong_labels" not in clean.run()["methods"]["kd"]["seeds"]["0"]
    found = noisy.run()
    assert found["methods"]["kd"]["seeds"]["0"]["wrong_labels"] == 0.5
    assert "Of the labels that it learns from 50.0 % are wrong (pair noise)." in noisy.page()
    images = Images.load(noisy.study.config.experiment)
    assert images.for_teacher(0, 10, "train").true_labels is not None
    assert images.test.true_labels is None

    def absurd(*args: Any, **options: Any) -> ImageSet:
        images = with_label_noise(*args, **options)
        return replace(images, true_labels=torch.zeros(len(images), dtype=torch.int64))

    monkeypatch.setattr("fedkd.studies.central.training.with_label_noise", absurd)
    blind = Done(study(*words, noise), tmp_path)
    blind.run()
    for place in ("teachers/0/teacher.pt", "methods/kd/seed0/student.pt"):
        weights, again, other = (
            load_state(done.path / place)["weights"] for done in (noisy, blind, clean)
        )
        assert all(torch.equal(weights[key], again[key]) for key in weights)
        assert any(not torch.equal(weights[key], other[key]) for key in weights)


DOMAINS = "data.domains={sources: [invert, noise], target: {name: rotate, degrees: 90}}"


def test_teachers_know_their_domains_and_students_the_target_without_labels(
    tmp_path: Path,
) -> None:
    pair = {"models": ["mlp", "cnn_tiny"], **TRAINING}
    adapt = ["kd", {"name": "im", "weight": 0.3}, "fixmatch"]
    methods = {"kd": ["kd"], "adapt": adapt}
    done = Done(
        study(DOMAINS, f"experiment.teachers={json.dumps(pair)}", methods=methods), tmp_path
    )
    found = done.run()
    assert list(found["teachers"][0]["sources"]) == ["invert", "noise"]
    assert set(found["methods"]) == {"student", "kd", "adapt"}
    assert all("sources" in row["seeds"]["0"] for row in found["methods"].values())
    page = done.page()
    assert "target: rotate degrees=90" in page
    assert "student with the target&#39;s labels" in page
    assert "of which each knows one domain (invert, noise)" in page

    images = Images.load(done.study.config.experiment)
    assert images.domains is not None
    parts = [images.train, images.for_teacher(0, None, "x"), images.for_teacher(1, None, "x")]
    assert [len(part) for part in parts] == [20, 20, 20]
    # The same picture is in one domain only: turned back and made bright again, none is twice.
    train, _ = load_dataset("synthetic", classes=3, size=8, per_class=20)
    back = [parts[0].images.rot90(-1, (2, 3)), 255 - parts[1].images]
    places = [
        {int((train.images == one).flatten(1).all(1).nonzero()[0]) for one in part} for part in back
    ]
    assert len(places[0] | places[1]) == 40
    assert images.for_student(images.train, baseline=False).labels is None
    assert images.for_student(images.train, baseline=True).labels is not None


def test_what_does_not_go_with_domains_is_refused() -> None:
    two = {"models": ["mlp", "mlp"], **TRAINING}
    words = (DOMAINS, f"experiment.teachers={json.dumps(two)}")
    noisy = {"distillation.noisy": {"method": "gmm", "warmup": 1}, "distillation.losses": ["ce"]}
    for name, changes in (("unlabelled", {"distillation.unlabelled": 3}), ("noisy", noisy)):
        with pytest.raises(ConfigError, match=rf"methods\.x: distillation\.{name}: with .*domains"):
            study(*words, methods={"x": changes}).check()
    with pytest.raises(ConfigError, match=r"domains\.sources: 2 domains for 1 teachers"):
        study(DOMAINS, methods={"kd": ["kd"]}).check()


# -- a whole study ---------------------------------------------------------------------------------


def test_everything_is_in_the_folder(finished: Done) -> None:
    found = json.loads((finished.path / "results.json").read_text())
    assert found["finished"]
    assert list(found["methods"]) == ["student", "kd", "vrm"]
    assert (finished.path / "teachers" / "0" / "teacher.pt").is_file()
    for method in found["methods"]:
        for seed in (0, 1):
            place = finished.student(method, seed)
            epochs = place.epochs()
            assert [epoch["epoch"] for epoch in epochs] == [1, 2]
            assert {"loss", "terms", "gradients", "accuracy", "lr", "seconds"} <= set(epochs[0])
            result = place.result()
            assert result["last"] == epochs[-1]["accuracy"]
            assert result["best"] == max(epoch["accuracy"] for epoch in epochs)
            assert result["images_per_second"] > 0
            assert not place.checkpoint.exists()
    row = found["methods"]["kd"]
    scores = [row["seeds"][seed]["last"] for seed in ("0", "1")]
    assert row["last"] == {
        "mean": statistics.fmean(scores),
        "std": statistics.stdev(scores),
        "n": 2,
    }
    assert set(finished.student("kd", 0).epochs()[0]["gradients"]) == {"ce", "kd"}


def test_methods_of_a_seed_start_from_the_same_weights_and_seeds_do_not(finished: Done) -> None:
    def first(method: str, seed: int) -> float:
        return float(finished.student(method, seed).epochs()[0]["terms"]["ce"])

    hashes = {
        (method, seed): finished.student(method, seed).result()["hash"]
        for method in ("student", "kd", "vrm")
        for seed in (0, 1)
    }
    assert len(set(hashes.values())) == 6
    images = Images.load(finished.study.config.experiment)
    place = Place(Path(), "student")
    chains = {
        (method, seed): next(chain(finished.study.runs[method], method, seed, place, [[]]))
        for method in ("student", "kd")
        for seed in (0, 1)
    }
    assert chains["student", 0].init == chains["kd", 0].init != chains["kd", 1].init
    assert chains["student", 0].seed == chains["kd", 0].seed
    assert images.network(chains["kd", 0].model, 0).mean.shape == (1, 1, 1, 1)


def training(seed: int, last: float, best: float) -> dict[str, Any]:
    """What a training wrote down."""
    return {
        "model": "mlp", "seed": seed, "parameters": 7, "last": last, "best": best, "seconds": 2.0,
    }  # fmt: skip


def kept(done: Done, method: str, accuracies: Sequence[tuple[float, float]]) -> None:
    """Students of a method with these last and best accuracies, as if they had been trained."""
    for cell in done.study.cells:
        if cell.name == method:
            done.folder.finish(cell, training(cell.seed, *accuracies[cell.seed]))


def test_mean_deviation_and_best_epoch_are_kept_apart(tmp_path: Path) -> None:
    done = Done(study("seeds=[0,1,2]", "only=[kd]"), tmp_path)
    kept(done, "kd", [(0.5, 0.9), (0.6, 0.7), (0.7, 0.8)])
    row = done.results["methods"]["kd"]
    assert row["last"]["mean"] == pytest.approx(0.6)
    assert row["last"]["std"] == pytest.approx(0.1)
    assert row["best"]["mean"] == pytest.approx(0.8)
    assert row["seconds"] == 2.0
    assert row["images_per_second"] is None
    assert done.results["methods"]["student"]["last"] is None
    assert not done.results["finished"]
    page = done.page()
    assert "60.00 ± 10.00" in page
    assert "not complete · 3 of 6 students" in page


def test_costs_are_kept_and_shown_and_are_no_reason_to_train_again(tmp_path: Path) -> None:
    done = Done(study("seeds=[0,1]", "only=[kd]", "experiment.resources.energy.watts=50"), tmp_path)
    kept(done, "kd", [(0.5, 0.5), (0.6, 0.6)])
    row = done.results["methods"]["kd"]
    assert (row["joules"], done.results["energy"]) == (100.0, "assumed at 50 W")
    assert "energy, assumed" in done.page()
    cell = done.study.cells[0]
    cheap = study("seeds=[0,1]", "only=[kd]")
    assert cell.gave(Done(cheap, tmp_path / "again").study.cells[0].settings())
    unknown = Done(cheap, tmp_path / "unknown")
    kept(unknown, "kd", [(0.5, 0.5), (0.6, 0.6)])
    assert unknown.results["methods"]["kd"]["joules"] is None
    assert "counters cannot be read" in unknown.page()


def test_the_page_names_a_student_that_failed(tmp_path: Path) -> None:
    done = Done(study("seeds=[0]", "only=[kd]"), tmp_path)
    cell = next(cell for cell in done.study.cells if cell.name == "kd")
    done.folder.finish(cell, {"error": "RuntimeError: out of memory", "traceback": ""})
    assert "kd, seed 0 failed: RuntimeError: out of memory" in done.page()


def test_a_method_counts_as_a_help_only_beyond_chance(tmp_path: Path) -> None:
    done = Done(study("seeds=[0,1,2]", "only=[kd,vrm]"), tmp_path)
    accuracies = {
        "student": (0.50, 0.52, 0.51),
        "kd": (0.55, 0.48, 0.53),  # +1.00 on average, which may be chance
        "vrm": (0.60, 0.61, 0.61),
    }
    for name, values in accuracies.items():
        kept(done, name, [(last, last) for last in values])
    page = done.page()
    assert "methods that surely help" in page
    assert "1 of 2" in page
    assert "+1.00 ± 11.38" in page
    assert "60.67 ± 0.58 %" in page  # the headline has its spread


def test_the_page_needs_nothing_but_itself(finished: Done) -> None:
    page = (finished.path / "report.html").read_text(encoding="utf-8")
    assert "student alone" in page
    assert "chosen on the test set" in page
    assert not re.search(r"https?://|<script [^>]|@import|url\((?!#)", page)
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="|url\()#([\w-]+)', page)) <= set(ids)
    assert finished.page() == page


def test_a_student_comes_back_as_it_was(finished: Done) -> None:
    images = Images.load(finished.study.config.experiment)
    network = load_trained(finished.student("kd", 1).path).network
    result = finished.student("kd", 1).result()
    assert images.accuracy(network) == result["last"]
    with pytest.raises(ConfigError, match="has no finished student"):
        load_trained(finished.student("kd", 7).path)


def test_a_student_is_used_without_its_study(finished: Done, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"finished students: name the folder of one, e\.g\. /"):
        load_trained(finished.path)
    alone = tmp_path / "taken" / "away"
    shutil.copytree(finished.student("kd", 1).path, alone)
    student = load_trained(alone)
    images = Images.load(finished.study.config.experiment)
    channels = images.test.shape[0]
    pixels = images.test.images[0].permute(1, 2, 0).numpy()
    Image.fromarray(pixels[..., 0] if channels == 1 else pixels).save(tmp_path / "one.png")
    ((_, best),) = predict_files(student, [tmp_path / "one.png"], top=1)
    with torch.no_grad():
        network = load_trained(finished.student("kd", 1).path).network
        expected = network(images.test.images[:1]).softmax(1).max(1)
    assert best[0][0] == images.test.classes[int(expected.indices)]
    assert best[0][1] == pytest.approx(float(expected.values), abs=1e-5)
    done = export_student(student, "torch")
    assert (done.path, done.agreement) == (alone / "student.pt2", 1)
    assert done.missing is not None
    whole = load_trained(finished.student("kd", 1).path)
    assert whole.test().images.shape == images.test.images.shape
    (alone / "student.pt").write_bytes(b"damaged")
    with pytest.raises(ConfigError, match=r"student\.pt cannot be used"):
        load_trained(alone)


# -- going on --------------------------------------------------------------------------------------


def listener(wanted: str, fact: str, found: list[Any]) -> Callable[..., None]:
    """Keeps one fact of each event of a name."""
    return lambda event, **facts: found.append(facts[fact]) if event == wanted else None


def stop_at(label: str, epoch: int) -> Callable[..., None]:
    def notify(event: str, **facts: Any) -> None:
        if event == "epoch" and facts["label"] == label and facts["epoch"] == epoch:
            raise Interrupted

    return notify


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Done:
    with mock.patch("fedkd.studies.central.study.write_report"):
        done = Done(study(*both("epochs=3"), "only=[vrm]"), tmp_path_factory.mktemp("whole"))
        done.run()
    return done


@pytest.mark.parametrize(
    ("label", "epoch", "every", "killed"),
    [
        ("teacher", 1, 1, False),
        ("vrm, seed 0", 2, 10, False),
        ("vrm, seed 0", 2, 2, False),
        ("vrm, seed 0", 2, 2, True),
    ],
)
def test_an_interrupted_training_goes_on_in_its_epoch(
    whole: Done, tmp_path: Path, unreported: None, label: str, epoch: int, every: int, killed: bool
) -> None:
    chosen = study(*both("epochs=3"), *both(f"checkpoint_every={every}"), "only=[vrm]")
    broken = Done(chosen, tmp_path).again()
    with pytest.raises(Interrupted):
        broken.run(stop_at(label, epoch))
    if killed:  # -9 leaves an epoch more in the records than in the checkpoint, and half a line
        records = broken.student("vrm", 0).path / "metrics.jsonl"
        more = {**json.loads(records.read_text().splitlines()[-1]), "epoch": 3}
        records.write_text(f'{records.read_text()}{json.dumps(more)}\n{{"epo')
    trained: list[Any] = []
    again = broken.again()
    again.run(listener("epoch", "label", trained))
    assert trained.count(label) == 3 - epoch
    for name in ("student", "vrm"):
        ours, theirs = (done.student(name, 0) for done in (again, whole))
        assert ours.result()["hash"] == theirs.result()["hash"]
        for one, two in zip(ours.epochs(), theirs.epochs(), strict=True):
            for key in ("epoch", "loss", "accuracy"):
                assert one[key] == two[key]


def test_a_training_of_other_settings_makes_room(tmp_path: Path, unreported: None) -> None:
    done = Done(study(*both("epochs=1"), "only=student"), tmp_path)
    done.run()
    changed = study("distillation.epochs=2", "teachers.epochs=1", "only=student")
    folder = StudyFolder.open(done.path, DistillConfig, changed.config)
    trained: list[Any] = []
    run_study(changed, folder, listener("epoch", "label", trained))
    assert trained == ["student, seed 0"] * 2  # the teacher is the same
    assert len(done.student("student", 0).epochs()) == 2


# -- chains and teachers ---------------------------------------------------------------------------


def test_a_chain_learns_from_the_next_or_from_all(run: Callable[..., Done]) -> None:
    done = run(
        "distillation.assistants=[{name: cnn_tiny, width: 12}]",
        methods={
            "near": "kd",
            "all": {"distillation.losses": "kd", "distillation.assistant_mode": "dgkd"},
            "none": {"distillation.losses": "kd", "distillation.assistants": []},
        },
    )  # fmt: skip
    for name in ("near", "all"):
        assistant = done.student(name, 0).assistant(1).result()
        assert assistant["parameters"] > done.student(name, 0).result()["parameters"]
    first, second = object(), object()
    expected = {"near": ([second], [1.0]), "all": ([first, second], [1.0, 1.0])}
    for name, (teachers, weights) in expected.items():
        ranks: list[Any] = [[first]]
        tasks = chain(done.study.runs[name], name, 0, done.student(name, 0), ranks)
        assert list(next(tasks).teachers) == [first]
        ranks.append([second])
        student = next(tasks)
        assert (list(student.teachers), list(student.weights or ())) == (teachers, weights)
    none = chain(done.study.runs["none"], "none", 0, done.student("none", 0), [[first]])
    assert len(list(none)) == 1
    assert done.results["methods"]["all"]["assistant_mode"] == "dgkd"


def test_every_rank_of_a_dense_chain_weighs_the_same() -> None:
    dense = ("distillation.assistants=[mlp]", "distillation.assistant_mode=dgkd")
    ranks: list[Any] = [["t1", "t2"]]
    tasks = chain(study(*dense).runs["kd"], "kd", 0, Place(Path(), "student"), ranks)
    assert next(tasks).weights == [0.5, 0.5]
    ranks.append(["a"])
    assert next(tasks).weights == [0.5, 0.5, 1.0]


def test_teachers_are_shared_unless_each_seed_has_its_own(run: Callable[..., Done]) -> None:
    done = run("seeds=[0,1]", "teachers.per_seed=true", "only=student", *both("epochs=1"))
    places = (Place.of_teacher(done.path, 0, seed) for seed in (0, 1))
    assert len({place.result()["hash"] for place in places}) == 2
    assert done.results["teachers"][0]["last"]["n"] == 2


def test_a_teacher_may_have_seen_more_images(run: Callable[..., Done]) -> None:
    seen: dict[str, float] = {}

    def notify(event: str, **facts: Any) -> None:
        if event == "epoch":
            seen[facts["label"]] = facts["images_per_second"] * facts["seconds"]

    run("data.train=20", "teachers.train=50", "only=student", *both("epochs=1"), notify=notify)
    assert {label: round(count) for label, count in seen.items()} == {
        "teacher": 50,
        "student, seed 0": 20,
    }


# -- checkpoints -----------------------------------------------------------------------------------


@pytest.fixture
def resnet(tmp_path: Path) -> Callable[..., Path]:
    """Writes a ResNet-8's weights under other names and wrappings."""
    given = study("student.model=resnet8").config.experiment
    network = Images.load(given).network(given.student.model, 5)
    body = network.body.state_dict()

    def write(kind: str) -> Path:
        file = tmp_path / f"{kind}.pt"
        content: Any = {
            "bare": body,
            "wrapped": {"epoch": 3, "model": {f"module.{k}": t for k, t in body.items()}},
            "whole": {"state_dict": network.state_dict()},
            "foreign": {
                f"layer{number}": tensor
                for number, (key, tensor) in enumerate(body.items())
                if not key.endswith("num_batches_tracked")
            },
            "classes": {
                k: torch.zeros(7, *t.shape[1:]) if k.startswith("head") else t
                for k, t in body.items()
            },
            "short": dict(list(body.items())[:-1]),
            "numbers": {"epoch": 3},
        }.get(kind)
        torch.save(network if kind == "code" else content, file)
        return file

    return write


@pytest.mark.parametrize("kind", ["bare", "wrapped", "whole", "foreign"])
def test_teachers_come_from_files_of_many_shapes(
    run: Callable[..., Done], resnet: Callable[..., Path], kind: str
) -> None:
    remarks: list[Any] = []
    folder = run(
        "teachers.models=[resnet8]", f"teachers.checkpoints=[{resnet(kind)}]", "only=student",
        *both("epochs=1"), notify=listener("warning", "text", remarks),
    )  # fmt: skip
    images = Images.load(folder.study.config.experiment)
    model = study("student.model=resnet8").config.experiment.student.model
    expected = images.network(model, 5).eval()
    result = Place.of_teacher(folder.path, 0, None).result()
    assert result["last"] == images.accuracy(expected)
    assert len(remarks) == (kind == "foreign")
    assert folder.results["teachers"][0]["source"].endswith(f"{kind}.pt")


@pytest.mark.parametrize(
    ("kind", "model", "expected"),
    [
        ("classes", "resnet8", "does not fit resnet8 for 3 classes: head.weight is 7x64, expected"),
        ("bare", "resnet14", "does not fit resnet14 for 3 classes: it has no 'stage1.1.branch.0"),
        ("bare", "wrn_16_1", "does not fit wrn_16_1 for 3 classes"),
        ("short", "resnet8", "it has no 'head.bias'"),
        ("numbers", "resnet8", "holds no weights"),
        ("code", "resnet8", "expected tensors, as torch.save(model.state_dict()) writes"),
    ],
)
def test_a_file_that_does_not_fit_is_one_line(
    resnet: Callable[..., Path], kind: str, model: str, expected: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        study(f"teachers.models=[{model}]", f"teachers.checkpoints=[{resnet(kind)}]").check()
    assert str(caught.value).startswith("experiment.teachers.checkpoints.0: ")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_networks_begin_with_files_and_are_trained(
    run: Callable[..., Done], resnet: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[Any] = []
    file = resnet("classes")
    monkeypatch.setenv("FEDKD_DATA", str(file.parent))
    entry = "{name: resnet8, weights: classes.pt}"
    done = run(
        f"teachers.models=[{entry}]", f"student.model={entry}", "only=student", *both("epochs=1"),
        notify=listener("warning", "text", said),
    )  # fmt: skip
    assert said == [
        "classes.pt: its head head.weight is for 7 classes and not 3; resnet8 for 3 classes "
        "starts with a new head"
    ]
    versions = json.loads((done.path / "versions.json").read_text())
    assert versions["weights classes.pt"] == file_hash(file)
    file.write_bytes(resnet("bare").read_bytes())
    done.folder.file(done.study.cells[0]).unlink()
    with pytest.raises(ConfigError, match=r"the weights in classes\.pt are not those"):
        done.again().run()


def test_a_file_that_a_network_begins_with_is_checked_first(resnet: Callable[..., Path]) -> None:
    words = f"teachers.models=[{{name: resnet14, weights: {resnet('bare')}}}]"
    with pytest.raises(ConfigError, match="does not fit resnet14 for 3 classes: it has no"):
        study(words).check()


def test_adapters_learn_in_a_study_and_leave_it_merged(
    run: Callable[..., Done], resnet: Callable[..., Path], tmp_path: Path
) -> None:
    file = resnet("bare")
    entry = f"{{name: resnet8, weights: {file}, peft: {{method: lora, r: 2}}}}"
    words = (f"teachers.models=[{entry}]", f"student.model={entry}", "only=[kd]")
    done = run(*words, *both("epochs=1"))
    place = done.path / "methods" / "kd" / "seed0"
    saved = load_state(place / "student.pt")["weights"]
    assert {"base.sha256", "body.head.weight"} < set(saved)
    assert not {"body.stem.0.0.weight", "body.stem.0.1.running_mean"} & set(saved)
    learnt = sum(t.numel() for name, t in saved.items() if name.startswith("body"))
    assert done.results["methods"]["kd"]["trainable"] == learnt
    assert done.results["teachers"][0]["trainable"] == learnt < 80_000
    assert export_student(load_trained(place), "torch", tmp_path / "s.pt2").difference < 1e-5
    with pytest.raises(ConfigError, match=r"teachers\.models\.0\.weights; give the file there"):
        study(words[0], f"teachers.checkpoints=[{file}]").check()


# -- precision and layout --------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_and_channels_last_learn_as_well(
    run: Callable[..., Done], precision: str
) -> None:
    folder = run(
        *both(f"precision={precision}"), *both("channels_last=true"), "only=kd", *both("epochs=8"),
        "student.model.norm=batch",
    )  # fmt: skip
    result = folder.student("kd", 0).result()
    assert result["last"] > 0.6  # chance is 0.33
    network = load_trained(folder.student("kd", 0).path).network
    assert all(weight.dtype == torch.float32 for weight in network.parameters())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch.compile's
def test_a_compiled_network_is_read_like_another() -> None:
    given = study().config.experiment
    images = Images.load(given)
    plain, compiled = (images.network(given.student.model, 0) for _ in range(2))
    compiled(images.train.images[:4])  # hooks set after a first plain call must be seen too
    compiled.compile_reading(backend="eager")
    ours, theirs = (network.read(images.train.images[:8]) for network in (compiled, plain))
    for one, two in zip((ours.logits, *ours.stages), (theirs.logits, *theirs.stages), strict=True):
        assert one.equal(two)
    assert ours.pooled is not None
    assert ours.final is not None
    ours.stages[0].sum().backward()
    assert next(compiled.parameters()).grad is not None


@pytest.mark.slow
def test_a_study_of_compiled_networks_comes_to_the_same(run: Callable[..., Done]) -> None:
    compiled, plain = (
        run(*both(f"compile={on}"), "only=cat", methods={"cat": ["ce", "cat"]})
        for on in ("true", "false")
    )
    ours, theirs = (folder.student("cat", 0).epochs() for folder in (compiled, plain))
    for one, two in zip(ours, theirs, strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-3)


def test_the_test_set_need_not_be_looked_at_every_epoch(run: Callable[..., Done]) -> None:
    folder = run(*both("test_every=2"), *both("epochs=3"), "only=kd")
    epochs = folder.student("kd", 0).epochs()
    assert [epoch["accuracy"] is None for epoch in epochs] == [True, False, False]


def test_images_without_labels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def unlabelled(*_: Any, **__: Any) -> tuple[ImageSet, ImageSet]:
        images = ImageSet(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), None, ("a", "b", "c"))
        return images, images

    monkeypatch.setattr("fedkd.studies.central.training.load_dataset", unlabelled)
    with pytest.raises(ConfigError, match="needs labelled images"):
        Images.load(study().config.experiment)


# -- expansion -------------------------------------------------------------------------------------

MIXER = "student.model=mixer"


def test_generations_teach_each_other_and_speak_together(run: Callable[..., Done]) -> None:
    done = run(
        "seeds=[0,1]", "distillation.epochs=1", methods={"born": {"distillation.generations": 3}}
    )
    row = done.results["methods"]["born"]
    record = row["seeds"]["0"]
    assert len(record["generations"]) == 3
    assert record["generations"][-1] == record["last"]
    assert row["ensemble"]["n"] == 2
    folders = [done.student("born", 0).generation(n).path for n in (1, 2)]
    assert all((folder / "student.pt").is_file() for folder in folders)
    first, second = (load_trained(folder).network.state_dict() for folder in folders)
    assert any(not torch.equal(first[key], second[key]) for key in first)
    tasks = chain(done.study.runs["born"], "born", 0, done.student("born", 0), ranks := [["t"]])
    whom = []
    for number, task in enumerate(tasks):
        whom.append(list(task.teachers))
        ranks.append([number])  # type: ignore[list-item]
    assert whom == [["t"], [0], [1]]


def test_an_interrupted_generation_goes_on_to_the_same_student(
    run: Callable[..., Done], tmp_path: Path
) -> None:
    words = ("distillation.epochs=2", "distillation.checkpoint_every=1")
    method = {"born": {"distillation.generations": 2, "distillation.noise": {"dropout": 0.5}}}
    whole = run(*words, methods=method)

    def stop(event: str, **facts: Any) -> None:
        if event == "epoch" and facts["label"] == "born, seed 0" and facts["epoch"] == 1:
            raise Interrupted

    half = Done(study(*words, methods=method), tmp_path)
    with pytest.raises(Interrupted):
        half.run(stop)
    again = half.again()
    again.run()
    ours, theirs = (d.results["methods"]["born"]["seeds"]["0"] for d in (whole, again))
    assert ours["hash"] == theirs["hash"]
    assert ours["ensemble"] == theirs["ensemble"]


def test_noise_is_the_students_alone_and_gone_in_evaluation(run: Callable[..., Done]) -> None:
    noisy = {
        "distillation.noise": {"dropout": 0.5, "survival": 0.8},
        "distillation.teachers_see": "clean",
        "distillation.unlabelled": 12,
        "distillation.generations": 2,
    }
    words = (MIXER, "distillation.epochs=1", "data.train=24")
    done = run(*words, methods={"noisy": noisy, "plain": ["ce", "kd"]})
    found = done.results["methods"]
    assert found["noisy"]["seeds"]["0"]["hash"] != found["plain"]["seeds"]["0"]["hash"]
    network = load_trained(done.student("noisy", 0).path).network
    images = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
    assert torch.equal(network(images), network(images))
    assert "noisy, 2 together" in str(methods_table(done.results).rows[-1])


def test_what_cannot_be_noisy_is_refused() -> None:
    for noise, message in (
        ({"survival": 0.8}, r"noise.survival: 'cnn_tiny' has no residual blocks"),
        ({"dropout": 1.0}, r"noise.dropout"),
    ):
        with pytest.raises(ConfigError, match=message):
            study(methods={"noisy": {"distillation.noise": noise}}).check()
    with pytest.raises(ConfigError, match=r"distillation.unlabelled: 1000 images are asked for"):
        study(methods={"more": {"distillation.unlabelled": 1000}}).check()


def test_unlabelled_images_are_named_by_the_teachers_on_clean_pixels() -> None:
    images = torch.randint(256, (6, 1, 8, 8), dtype=torch.uint8)
    labelled = ImageSet(images[:2], torch.tensor([2, 2]), ("a", "b", "c"))
    teacher = build_model("mlp", num_classes=3, in_channels=1, image_size=8, mean=[0.5], std=[0.3])
    made: dict[str, Any] = {"augment": "crop", "batch_size": 6, "unlabelled": images[2:]}
    batches = OnlineBatches(labelled, [teacher.eval()], [Logits()], clean=True, **made)
    batch = batches.batch(torch.arange(6), 1, 0)
    named = teacher(images).argmax(1)
    assert batch.targets is not None
    assert batch.targets.tolist() == [2, 2, *named[2:].tolist()]
    assert not torch.equal(batch.images, images)
    assert torch.allclose(batch.ensemble.logits[0], teacher(images))
    with pytest.raises(ValueError, match="no teacher that names"):
        OnlineBatches(labelled, **made)


# -- specialists -----------------------------------------------------------------------------------

PARTS = {
    **EXPERIMENT,
    "teachers": {**EXPERIMENT["teachers"], "models": ["cnn_tiny", "mlp"],
                 "classes": [[0, 1], ["pattern 2", 0]]},
}  # fmt: skip


def test_teachers_of_different_classes_teach_one_student(run: Callable[..., Done]) -> None:
    done = run(experiment=PARTS, methods={"subset": ["ce", "subset_kd"]})
    weights = load_trained(Place.of_teacher(done.path, 1, None).path)
    assert weights.classes == ("pattern 0", "pattern 2")
    assert done.results["teachers"][0]["last"]["mean"] <= 0.7
    assert len(load_trained(done.student("subset", 0).path).classes) == 3


@pytest.mark.parametrize(
    ("words", "methods", "message"),
    [
        ((), {"kd": ["ce", "kd"]}, r"methods.kd: teachers.classes: loss 'kd' takes every teacher"),
        ((), {"cat": ["cat"]}, r"loss 'cat' takes every teacher to know every class"),
        (("teachers.classes=[[0,1]]",), {}, "classes: expected one for each of 2 models"),
        (("teachers.classes=[[0],[1,2]]",), {}, "at least two classes apart, got 1"),
        (("teachers.classes=[[0,9],[1,2]]",), {}, "classes are 0 to 2, got 9"),
        (("teachers.classes=[[0,x],[1,2]]",), {}, "there is no class 'x'"),
    ],
)
def test_what_specialists_cannot_do_is_refused(
    words: tuple[str, ...], methods: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        study(*words, experiment=PARTS, methods=methods).check()


def test_a_students_confidence_is_set_right_on_images_that_are_left_over(tmp_path: Path) -> None:
    done = Done(study("data.train=60", "data.dataset.per_class=60", "only=[kd]"), tmp_path)
    done.run()
    place = done.student("kd", 0)
    record = place.result()
    assert record is not None
    scaled = record["temperature"]
    images = Images.load(done.study.config.experiment)
    assert scaled["images"] == len(images.everything) - 60
    student = load_trained(place.path)
    assert student.temperature == student.about["temperature"] == scaled["value"] != 1.0
    logits = predict(student.network, images.test.images)
    assert calibration(logits, images.test.labels).ece == record["ece"]
    assert calibration(logits / scaled["value"], images.test.labels).ece == scaled["ece"]
    assert torch.allclose(
        student(images.test.images), torch.softmax(logits / scaled["value"], 1), atol=1e-6
    )
    found = done.results
    assert found["tests"] == len(images.test)
    table = methods_table(found)
    assert f"{len(images.test)} test images" in table.title
    place_of = [column.title for column in table.columns].index
    before, after = (
        {str(row.cells[place_of(title)]) for row in table.rows}
        for title in ("ECE, %", "ECE scaled, %")
    )
    assert f"{100 * record['ece']:.1f}" in before
    assert f"{100 * scaled['ece']:.1f}" in after
    assert images.left_over(len(images.everything) - 100) is None  # 40 are too few
