"""Files of a run that were cut, edited or mixed up: refused by name, and by what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedkd.config import ConfigError, make_config, make_experiment
from fedkd.io.records import SUMMARY, Damaged, append_line, mismatch, read_json, read_lines
from fedkd.knowledge.kinds import Logits
from fedkd.knowledge.payload import Knowledge, Teacher
from fedkd.knowledge.store import KnowledgeStore
from fedkd.runs.directory import RunDirectory
from fedkd.runs.events import RoundFinished, read_events
from fedkd.studies.attack.config import AttackConfig
from fedkd.studies.attack.study import AttackStudy
from fedkd.studies.engine import StudyFolder, results_of
from fedkd.training.evaluation import Scores


@pytest.mark.parametrize(
    ("value", "shape", "expected"),
    [
        (1, int, None),
        (True, int, "it is True, not of type int"),
        (True, bool, None),
        (1.5, (int, float), None),
        (None, (int, None), None),
        ("x", (int, None), "it is 'x', not of type int"),
        ("train", {"train", "knowledge"}, None),
        ("x", {"train"}, "it is 'x', not one of ['train']"),
        ([], {"train"}, "it is [], not one of ['train']"),
        ([1, "x"], [int], "1 is 'x', not of type int"),
        ({"a": 1}, {"a": int, "b?": str}, None),
        ({"a": 1, "b": 2}, {"a": int, "b?": str}, "b is 2, not of type str"),
        ({"b": {"c": []}}, {"b": {"c": {str: int}}}, "b.c is [], not a mapping"),
        ({}, {"a": int}, "a is missing"),
        (3, {"a": int}, "it is 3, not a mapping"),
        ({"x": 1, "y": "z"}, {str: int}, "y is 'z', not of type int"),
        ({"a": {"b": 1}}, {"a": (None, {"b": str})}, "a.b is 1, not of type str"),
    ],
)
def test_a_mismatch_names_the_key_and_what_is_there(value: Any, shape: Any, expected: str) -> None:
    assert mismatch(value, shape) == expected


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe{}", b"[" * 100_000, b"[]", b'{"name": 3}', b"\xef\xbb\xbf{}"]
)
def test_a_damaged_json_file_is_named(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "summary.json"
    file.write_bytes(content)
    with pytest.raises(Damaged, match=r"summary.json is damaged \(.*\); restore it"):
        read_json(file, SUMMARY)
    assert read_json(tmp_path / "absent.json", SUMMARY) is None


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
    assert [record["a"] for record in read_lines(file)] == [*range(1, kept + 1), 3, 4]


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
