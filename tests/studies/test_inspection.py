"""`fedkd inspect` on runs and studies: who is compared, what is kept, the page."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedkd.config import ConfigError, make_config
from fedkd.rounds import silent
from fedkd.runs.directory import RunDirectory, network_hash
from fedkd.studies.central.config import DistillConfig
from fedkd.studies.central.study import DistillStudy
from fedkd.studies.engine import StudyFolder, run_study
from fedkd.studies.inspection.study import Options, inspect_run, inspect_study
from fedkd.studies.inspection.subjects import of_run, of_study
from fedkd.studies.unlearning import erasable
from fedkd.training.properties.readers import Kept, Weighed
from tests.conftest import Shared
from tests.simulations.conftest import Fedkd
from tests.simulations.conftest import fedkd as fedkd

QUICK = Options(images=30, triplets=2)
FEW = replace(QUICK, what="agreement,shift")


@pytest.fixture(autouse=True)
def lean(monkeypatch: pytest.MonkeyPatch) -> None:
    """No page, which takes longer than the rest; `inspected` has drawn one by then."""
    monkeypatch.setattr("fedkd.studies.inspection.report.write_page", lambda *_: None)


@pytest.fixture(scope="module")
def run(shared: Shared) -> RunDirectory:
    return shared("teachers.models=[cnn_tiny,mlp]", "teachers.epochs=3")


@pytest.fixture(scope="module")
def inspected(run: RunDirectory) -> dict[str, Any]:
    events: list[tuple[str, Any]] = []
    facts = inspect_run(run, QUICK, lambda event, **given: events.append((event, given)))
    facts["events"] = events
    return facts


@pytest.mark.smoke
def test_a_run_is_measured_and_written_down(run: RunDirectory, inspected: dict[str, Any]) -> None:
    written = json.loads((run.path / "properties.json").read_text())
    assert written["images"] == 30
    assert set(written["left_out"]) == {"colour", "inherits"}
    measured = set(written["properties"])
    assert {"adversarial", "agreement", "bias", "boundary", "sight", "domains"} <= measured
    row = written["properties"]["agreement"]["methods"]["student"]
    assert row["teacher"] == 1
    assert row["difference"] == pytest.approx(row["student"] - row["alone"])
    assert row["spread"] == max(abs(each - row["alone"]) for each in row["control"])
    assert len(written["by_teacher"]) == 3
    assert {client["client"] for client in written["clients"]} == {0, 1, 2}
    assert sum(client["share"] for client in written["clients"]) == pytest.approx(1)
    page = (run.path / "properties.html").read_text()
    for heading in ("What was taken over", "Where they look", "Teacher by teacher"):
        assert heading in page


def test_progress_is_shown_to_its_end(inspected: dict[str, Any]) -> None:
    steps = [facts for event, facts in inspected["events"] if event == "property"]
    assert [facts["done"] for facts in steps] == list(range(len(steps)))
    assert {facts["total"] for facts in steps} == {len(steps)}


def test_independent_students_are_trained_once(
    run: RunDirectory, inspected: dict[str, Any]
) -> None:
    events: list[str] = []
    again = inspect_run(run, FEW, lambda event, **_: events.append(event))
    assert "epoch" not in events
    assert again["properties"] == {
        name: inspected["properties"][name] for name in ("agreement", "shift")
    }


def test_the_first_independent_student_begins_like_the_distilled_one(run: RunDirectory) -> None:
    (trial,) = of_run(run, 10, silent).trials
    hashes = {network_hash(each.network) for each in trial.alone}  # type: ignore[attr-defined]
    assert len(hashes) == 3
    assert isinstance(trial.teacher, Weighed)
    assert trial.teacher.weights(torch.arange(10)).sum(0).tolist() == pytest.approx([1.0] * 10)
    assert run.path / "inspect" in erasable(run, [0])


def test_a_deployed_run_asks_nobody_for_gradients(run: RunDirectory, tmp_path: Path) -> None:
    shutil.copytree(run.path, tmp_path / "deployed", ignore=shutil.ignore_patterns("clients"))
    deployed = RunDirectory.open(tmp_path / "deployed")
    what = "agreement,boundary,domains,representation,adversarial,localisation,sight"
    facts = inspect_run(deployed, replace(QUICK, what=what))
    stayed = "the teachers stayed with their clients, which are not asked about changed images"
    assert {facts["left_out"][name] for name in ("boundary", "domains", "representation")} == {
        stayed
    }
    # The student of the round before stands in where one has to look inside.
    assert {"adversarial", "localisation", "sight", "agreement"} <= set(facts["properties"])
    assert facts["stand_in"] == "student of round 1"
    assert "the student of round 1 stands in for them" in facts["notes"][0]
    (trial,) = of_run(deployed, 30, silent).trials
    assert all(isinstance(each, Kept) for each in trial.teachers.values())
    # The kept answers are those that the teachers give.
    whole = of_run(run, 30, silent)
    (there,) = whole.trials
    rows = torch.arange(30)
    for name, reader in trial.teachers.items():
        given = there.teachers[name].logits(whole.images.images, rows)
        torch.testing.assert_close(reader.answers, given, atol=1e-3, rtol=1e-3)  # type: ignore[attr-defined]
    (tmp_path / "deployed" / "checkpoints" / "round-0001.pt").unlink()
    alone = inspect_run(deployed, replace(QUICK, what="adversarial,localisation"))
    assert {alone["left_out"][name] for name in ("adversarial", "localisation")} == {stayed}


def test_a_release_tells_nothing_of_single_teachers(shared: Shared) -> None:
    run = shared(
        "release={name: gnmax, epsilon: 50.0, min_votes: 1, queries: 24}",
        "fusion=[uniform]",
        "distillation.losses=[ce]",
        "teachers.models=[mlp]",
        "rounds=1",
        "evaluation.teachers=false",
    )
    facts = inspect_run(run, FEW)
    assert facts["left_out"]["agreement"].startswith("release:")
    assert facts["clients"] == []
    assert set(facts["properties"]) == {"shift"}


def test_options_are_refused_before_anything_is_loaded(run: RunDirectory, tmp_path: Path) -> None:
    for options, message in (
        (Options(images=0), "--images: expected at least 1"),
        (Options(triplets=0), "--triplets: expected at least 1"),
        (Options(what="agrement"), "--what: there is no property 'agrement'; did you mean"),
        (Options(groups=tmp_path / "none.npz"), "--groups: there is no file"),
    ):
        with pytest.raises(ConfigError, match=message):
            inspect_run(run, options)
    np.savez(tmp_path / "few.npz", group=np.zeros(3))
    with pytest.raises(ConfigError, match="one group for each of the 60 test images"):
        inspect_run(run, Options(groups=tmp_path / "few.npz", what="bias"))
    with pytest.raises(ConfigError, match="--marker: expected the class"):
        inspect_run(run, Options(marker="zebra", what="inherits"))


def test_groups_of_a_file_are_those_of_the_images(run: RunDirectory, tmp_path: Path) -> None:
    names = np.array(["north", "south", "west"])[np.arange(60) % 3]
    np.savez(tmp_path / "groups.npz", group=names)
    options = Options(images=30, groups=tmp_path / "groups.npz", what="bias", marker="1")
    facts = inspect_run(run, options)
    assert facts["groups"]["of"] == "group"
    assert facts["groups"]["names"] == ["north", "south", "west"]
    assert facts["properties"]["bias"]["methods"]["student"]["count"] <= 3


# -- a study -------------------------------------------------------------------------------

TRAINING = {"epochs": 2, "batch_size": 16, "augment": "none"}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    values = {
        "name": "tiny",
        "seeds": [0, 1],
        "experiment": {
            "data": {"dataset": {"name": "synthetic", "classes": 4, "size": 8, "per_class": 20}},
            "teachers": {"models": ["cnn_tiny", "mlp"], **TRAINING},
            "student": {"model": {"name": "cnn_tiny", "width": 4}},
            "distillation": TRAINING,
            "resources": {"device": "cpu"},
        },
        "methods": {"kd": ["ce", "kd"], "vrm": ["ce", "vrm"]},
    }
    made = DistillStudy(make_config(DistillConfig, values, []))
    folder = StudyFolder.new(made.config, tmp_path_factory.mktemp("study"))
    run_study(made, folder)
    return folder.path


def test_a_study_is_measured_for_every_method_and_seed(study: Path) -> None:
    facts = inspect_study(study, FEW)
    assert facts["methods"] == ["kd", "vrm"]
    assert facts["seeds"] == [0, 1]
    row = facts["properties"]["agreement"]["methods"]["kd"]
    assert len(row["seeds"]) == 2
    assert len(row["control"]) == 2
    assert row["error"] is not None
    assert set(facts["by_teacher"]) == {"teacher 0", "teacher 1"}
    # A third independent student was trained beside the study, with its options; it is kept.
    place = study / "inspect" / "alone-2" / "student.pt"
    before = place.stat().st_mtime_ns
    trials = of_study(study, 30, silent).trials
    assert place.stat().st_mtime_ns == before
    assert [each.name for each in trials[1].alone] == [f"independent {n}" for n in (1, 2, 0)]


def test_the_command_prints_the_table_and_names_the_page(study: Path, fedkd: Fedkd) -> None:
    words = ("--what", "agreement,colour", "--images", 20)
    code, out, err = fedkd("inspect", study, *words)
    assert (code, err) == (0, "")
    assert "Agreement" in out
    assert "colour: the images are grey" in out
    assert str(study / "properties.html") in out
    code, _, err = fedkd("inspect", study / "methods")
    assert code == 2
    assert "is not a run directory" in err
    code, out, _ = fedkd("list", "properties")
    assert code == 0
    assert "Share of images on which student and teacher name the same class." in out


def test_a_study_without_a_finished_method_is_refused(study: Path, tmp_path: Path) -> None:
    shutil.copytree(study, tmp_path / "begun", ignore=shutil.ignore_patterns("methods"))
    with pytest.raises(ConfigError, match="no method has finished beside the student alone"):
        inspect_study(tmp_path / "begun", QUICK)
