"""One student with several heads, from config to page, file and prediction."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fedkd.config import ConfigError
from fedkd.data.datasets import load_dataset
from fedkd.data.heads import Heads
from fedkd.reporting.run_page import write_report
from fedkd.reporting.run_record import Found
from fedkd.reporting.run_tables import heads_of
from fedkd.rounds import ExperimentContext
from fedkd.runs.directory import RunDirectory
from fedkd.runs.events import RoundFinished
from fedkd.runs.export import Trained, export_student, predict_files
from fedkd.simulations.local import run_local
from fedkd.simulations.ray import run_ray
from tests.conftest import Shared, Tiny

PARITY = "parity: {even: [0, 2], odd: [1, pattern 3]}"
TERMS = "{name: ce, head: digit}, {name: kd, head: digit}, {name: ce, head: parity}"
HEADS = (
    f"student.heads={{digit: classes, {PARITY}}}",
    "fusion=[uniform]",
    f"distillation.losses=[{TERMS}, {{name: dkd, head: parity}}, {{name: rkd, weight: 0.1}}]",
)


def last(run: RunDirectory) -> RoundFinished:
    return list(run.events(RoundFinished))[-1]


def test_a_run_measures_each_head(shared: Shared) -> None:
    found = last(shared(*HEADS))
    assert found.status == "ok"
    assert set(found.heads["student"]) == set(found.heads["ensemble"]) == {"digit", "parity"}
    dealt = [list(found.heads[str(client)]) for client in range(3)]
    assert dealt == [["digit"], ["parity"], ["digit"]]
    assert found.student.accuracy == pytest.approx(sum(found.heads["student"].values()) / 2)
    assert found.teachers[1] == found.heads["1"]["parity"]
    assert len(found.student.per_class) == 6
    table = heads_of(Found(shared(*HEADS)))
    assert table is not None
    assert [row.cells[0].text for row in table.rows][:2] == ["student", "ensemble"]  # type: ignore[union-attr]
    assert "Each head answers" in write_report(shared(*HEADS)).read_text()


def test_the_file_carries_its_heads_and_predicts_by_each(shared: Shared, tmp_path: Path) -> None:
    run = shared(*HEADS)
    picture = tmp_path / "black.png"
    write_picture(picture)
    ((_, found),) = predict_files(run, [picture], top=1)
    assert [name.split(":")[0] for name, _ in found] == ["digit", "parity"]
    done = export_student(run, "onnx", tmp_path / "student.onnx")
    exported = Trained.of_file(done.path)
    assert exported.heads == {"digit": 4, "parity": 2}
    ((_, again),) = predict_files(exported, [picture], top=1)
    assert [name for name, _ in again] == [name for name, _ in found]
    with pytest.raises(ConfigError, match=r"several .digit, parity.; leave"):
        export_student(run, "onnx", quantise="int8")


def write_picture(path: Path) -> None:
    from PIL import Image

    Image.new("L", (8, 8)).save(path)


def test_merged_specialists_and_a_chain_teach_heads_too(tiny: Tiny, lean: None) -> None:
    words = (*HEADS[:1], "fusion=[specialists]", f"distillation.losses=[{TERMS}]")
    run = run_local(tiny(*words, "distillation.assistants=[mlp]", "rounds=1"))
    assert last(run).status == "ok"


def test_a_round_in_which_a_head_has_no_teacher_is_degraded(tiny: Tiny, lean: None) -> None:
    run = run_local(tiny(*HEADS, "federation.participation=1"))
    assert last(run).status == "degraded"


@pytest.mark.slow
def test_on_ray_it_is_the_student_of_the_local_runner(tiny: Tiny, lean: None) -> None:
    found = [last(run(tiny(*HEADS))).hash for run in (run_local, run_ray)]
    assert found[0] == found[1]


def test_an_image_is_a_question_to_each_head() -> None:
    heads = Heads.of({"digit": "classes", "odd": {"no": ["a", 2], "yes": ["b"]}}, ("a", "b", "c"))
    assert heads.classes == ("digit: a", "digit: b", "digit: c", "odd: no", "odd: yes")
    assert heads.targets(torch.tensor([2, 1])).tolist() == [[2, 0], [1, 1]]
    logits = torch.tensor([[0.0, 1.0, 2.0, 9.0, 8.0]])
    rows, right = heads.questions(logits, torch.tensor([1]))
    assert rows.argmax(dim=1).tolist() == [2, 3]
    assert right.tolist() == [1, 4]
    assert heads.named(logits).tolist() == [[2, 0]]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["student.heads={parity: {even: [0, 2], odd: [1]}}"], "losses.0.head: there is no head"),
        (["student.heads={digit: classes, parity: {even: [0, 2], odd: [1]}}"],
         "student.heads.parity: is silent about pattern 3"),
        (["student.heads={digit: classes, parity: {even: [0, 2, 1], odd: [1, 3]}}"],
         "parity.odd: class 'pattern 1' is one of 'even' already"),
        (["student.heads={digit: classes, parity: {even: [0, 2, pattern 9], odd: [1, 3]}}"],
         "parity.even: the data set has no class 'pattern 9'"),
        (["student.heads={digit: classes, parity: {all: [0, 1, 2, 3]}}"], "at least two classes"),
        (["teachers.heads=[digit, party]"], "teachers.heads: there is no head 'party'.*'parity'"),
        (["teachers.heads=digit"], "student.heads.parity: none of 3 teachers knows its classes"),
        (["distillation.losses=[{name: ce, head: digit}]"], "student.heads.parity: no loss teach"),
        ([f"distillation.losses=[{TERMS}, kd]"], "losses.3: loss 'kd' compares classes, and one"),
        ([f"distillation.losses=[{TERMS}, {{name: cat, head: digit}}]"], "'cat .* compares cl"),
        ([f"distillation.losses=[{TERMS}, {{name: mmkd, head: digit}}]"], "'mmkd .digit.' learns"),
        (["fusion=[knowledge_vote]"], "student.heads: fusion 'knowledge_vote' takes every"),
        (["teachers.classes=[[0,1],[2,3],[0,1]]"], "teachers.classes: must be null with student"),
        (["teachers.feedback.use=regulariser"], "feedback.use: must be none with student.heads"),
        (["evaluation.baselines=[oracle]"], "evaluation.baselines: must be \\[\\] with student"),
        (["evaluation.detection=on"], "evaluation.detection: must be auto with student.heads"),
        (["data.validation=10"], "data.validation: must be 0 with student.heads"),
        (["distillation.batch_size=1"], "distillation.batch_size: a student with student.heads"),
        (["student.heads={}"], "distillation.losses.0.head: there is no head 'digit'"),
        (["student.heads={}", "distillation.losses=[ce]", "teachers.heads=digit"],
         "teachers.heads: needs student.heads"),
    ],
)  # fmt: skip
def test_what_cannot_be_with_heads_is_refused_by_name(
    tiny: Tiny, words: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        ExperimentContext(tiny(*HEADS, *words))


def test_columns_of_labels_are_combinations_of_which_a_head_takes_its_own(tmp_path: Path) -> None:
    ink = np.array(["red", "blue", "red", "red"])
    arrays = {"y_digit_train": np.array([3, 3, 10, 3]), "y_ink_train": ink}
    arrays |= {"y_digit_test": np.array([10, 3]), "y_ink_test": np.array(["red", "blue"])}
    pixels = {f"x_{part}": np.zeros((n, 4, 4), np.uint8) for part, n in (("train", 4), ("test", 2))}
    np.savez(tmp_path / "two.npz", **arrays, **pixels)
    train, test = load_dataset("npz", tmp_path, path="two.npz", columns=["digit", "ink"])
    assert train.classes == ("digit=3, ink=blue", "digit=3, ink=red", "digit=10, ink=red")
    heads = Heads.of({"digit": "column", "ink": "column"}, train.classes)
    assert heads.own == (("3", "10"), ("blue", "red"))
    assert train.labels is not None
    assert test.labels is not None
    assert heads.targets(train.labels).tolist() == [[0, 1], [0, 0], [1, 1], [0, 1]]
    assert heads.targets(test.labels).tolist() == [[1, 1], [0, 0]]
    with pytest.raises(ValueError, match="expected an array y_size_train of one label for each"):
        load_dataset("npz", tmp_path, path="two.npz", columns=["digit", "size"])
    with pytest.raises(ValueError, match="nothing of a column 'size'"):
        Heads.of({"size": "column"}, train.classes)
