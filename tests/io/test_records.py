"""Files of a run that were cut, edited or mixed up: refused by name, and by what is wrong."""

import json
import re
from pathlib import Path
from typing import Any, Literal, NotRequired

import numpy as np
import pytest
import torch
from typing_extensions import TypedDict

from fedkd.config import ConfigError, make_config, make_experiment
from fedkd.io.records import Damaged, append_line, read_json, read_lines
from fedkd.knowledge.kinds import Logits
from fedkd.knowledge.payload import Knowledge, Teacher
from fedkd.knowledge.store import KnowledgeStore
from fedkd.runs.directory import RunDirectory
from fedkd.runs.events import RoundFinished, read_events
from fedkd.runs.results import Summary
from fedkd.studies.attack.config import AttackConfig
from fedkd.studies.attack.study import AttackStudy
from fedkd.studies.engine import StudyFolder, results_of
from fedkd.training.evaluation import Scores


class Inner(TypedDict):
    c: dict[str, int]


class Outer(TypedDict):
    a: int
    b: NotRequired[Inner | None]
    word: NotRequired[Literal["train", "knowledge"]]
    flag: NotRequired[bool]
    some: NotRequired[list[float | None]]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"a": 1, "more": "is kept", "some": [1, None, 0.5]}, None),
        ({"a": True}, "a is True, should be a valid integer"),
        ({"a": 1.0}, "a is 1.0, should be a valid integer"),
        ({"a": 1, "flag": 1}, "flag is 1, should be a valid boolean"),
        ({"a": 1, "word": "x"}, "word is 'x', should be 'train' or 'knowledge'"),
        ({"a": 1, "some": [1, "x"]}, "some.1 is 'x', should be a valid number"),
        ({"a": 1, "b": {"c": []}}, "b.c is [], should be an object"),
        ({"a": 1, "b": {"c": {"x": 1, "y": "z"}}}, "b.c.y is 'z', should be a valid integer"),
        ({"b": None}, "a is missing"),
        (3, "it is 3, should be an object"),
    ],
)
def test_a_mismatch_names_the_key_and_what_is_there(
    tmp_path: Path, value: Any, expected: str | None
) -> None:
    file = tmp_path / "some.json"
    file.write_text(json.dumps(value))
    if expected is None:
        assert read_json(file, Outer) == value
    else:
        with pytest.raises(Damaged, match=re.escape(f"some.json is damaged ({expected})")):
            read_json(file, Outer)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe{}", b"[" * 100_000, b"[]", b'{"name": 3}', b"\xef\xbb\xbf{}"]
)
def test_a_damaged_json_file_is_named(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "summary.json"
    file.write_bytes(content)
    with pytest.raises(Damaged, match=r"summary.json is damaged \(.*\); restore it"):
        read_json(file, Summary)
    assert read_json(tmp_path / "absent.json", Summary) is None


def test_a_cut_last_line_is_dropped_and_any_other_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"event": "lift", "client": n}) for n in range(3)]
    file.write_text("\n".join(lines)[:-4])
    assert [event.client for event in read_events(file)] == [0, 1]
    file.write_text("\n".join([lines[0], lines[1][:-4], lines[2], ""]))
    with pytest.raises(Damaged, match="line 2 is damaged"):
        list(read_events(file))
    file.write_text(json.dumps({"event": "lift", "client": "1"}) + "\n")
    with pytest.raises(Damaged, match=r"line 1 is damaged .client is '1', should be a valid int"):
        list(read_events(file))


@pytest.mark.parametrize(("left", "kept"), [('{"a": 1}\n{"a": ', 1), ('{"a": 1}\n{"a": 2}', 2)])
def test_what_is_appended_after_a_crash_is_read(tmp_path: Path, left: str, kept: int) -> None:
    """The cut line and the next one used to become one that ended the reading of the file."""
    file = tmp_path / "ledger.jsonl"
    file.write_text(left)
    append_line(file, {"a": 3})
    append_line(file, {"a": 4})
    records = read_lines(file, dict[str, int])
    assert [record["a"] for record in records] == [*range(1, kept + 1), 3, 4]


def test_a_run_whose_events_lack_finished_rounds_is_not_resumed(tmp_path: Path) -> None:
    run = RunDirectory.new(make_experiment({}), tmp_path)
    for number in (1, 2):
        run.record(RoundFinished(round=number, student=Scores(accuracy=0.5)))
    run.rewind(1)
    assert [record.round for record in run.events(RoundFinished)] == [1]
    with pytest.raises(ConfigError, match="ends with round 1, the checkpoint is of round 2"):
        run.rewind(2)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("teacher.json", b'{"client": 0}', "num_examples is missing"),
        (
            "teacher.json",
            b'{"client": 0, "num_examples": null, "class_counts": null, "parameters": 1}',
            "client is 0, not 1",
        ),
        ("logits.npy", b"\x93NUMPY", "not an array"),
        ("logits.npy", b"", "not an array"),
        ("logits.npy", (3, 4), r"shape \(3, 4\), where client 0 has \(2, 4\)"),
    ],
)
def test_damaged_knowledge_is_named(
    tmp_path: Path, name: str, content: bytes | tuple[int, ...], expected: str
) -> None:
    store = KnowledgeStore(tmp_path)
    for client in (0, 1):
        store.put(Knowledge(Teacher(client), {Logits(): torch.zeros(2, 4)}))
    (tmp_path / "client-notes").mkdir()  # no client's
    file = tmp_path / "client-0001" / name
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        np.save(file, np.zeros(content, dtype=np.float32))
    with pytest.raises(Damaged, match=rf"client-0001/{name} is damaged \({expected}"):
        store.bank((Logits(),))


def test_cells_of_other_classes_are_not_averaged(tmp_path: Path) -> None:
    config = make_config(AttackConfig, {"rules": ["class_gated"], "attacks": ["collude"]})
    study, folder = AttackStudy(config), StudyFolder(tmp_path, config)
    for number, cell in enumerate(study.cells):
        scores = [0.5] * (3 if number else 2)
        folder.finish(cell, {"accuracy": 0.5, "per_class": scores, "refused": {}})
    with pytest.raises(Damaged, match=r"per_class has 3 classes, not the 2 of .*attack00.json"):
        results_of(study, folder)
