"""Numbers of papers in pieces: what was interrupted ends as what was not."""

import json
import sys
from pathlib import Path

import pytest
import torch

from tests.benchmarks.bare import ROOT, bare

sys.path.append(str(ROOT / "benchmarks"))

import papers

JOBS = ("teacher", "dkd+cat+vrm", "feddf-0.1", "fedkd-1")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """All in one call."""
    folder = tmp_path_factory.mktemp("whole")
    done = bare("papers.py", "--tiny", "--state", folder, "--only", ",".join(JOBS), cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def _call(folder: Path, *jobs: str, minutes: str = "5") -> int:
    words = ["--tiny", "--state", str(folder), "--minutes", minutes, "--only", ",".join(jobs)]
    return papers.main(words)


def _result(folder: Path, job: str):
    place = folder / f"{job}-seed0"
    result = json.loads((place / "result.json").read_text())
    weights = torch.load(place / "weights.pt", weights_only=True)
    assert not (place / "checkpoint.pt").exists()
    return {key: result[key] for key in ("last", "best", "count")}, weights


def _same(ours: Path, theirs: Path) -> None:
    for job in JOBS:
        (scores, weights), (their_scores, their_weights) = _result(ours, job), _result(theirs, job)
        assert scores == their_scores
        torch.testing.assert_close(weights, their_weights, rtol=0, atol=0)


def test_pieces_make_a_whole(whole, tmp_path, capsys):
    codes = []
    while not codes or codes[-1] == papers.MORE:
        codes.append(_call(tmp_path, *JOBS, minutes="0"))
    assert codes == [papers.MORE] * (len(codes) - 1) + [0]
    assert len(codes) >= 3 * len(JOBS)  # an epoch or a round each
    _same(tmp_path, whole)
    assert "| feddf-0.1 | 71.36 ± 1.07 | **" in capsys.readouterr().out


def test_a_call_that_is_killed_goes_on(whole, tmp_path, monkeypatch):
    score, left = papers.score, iter([False, False, True] * 40)

    def killed(*arguments):
        if next(left):
            raise KeyboardInterrupt
        return score(*arguments)

    monkeypatch.setattr(papers, "score", killed)
    kills = 0
    while True:
        try:
            assert _call(tmp_path, *JOBS) == 0
            break
        except KeyboardInterrupt:
            kills += 1
    assert kills >= len(JOBS)
    _same(tmp_path, whole)


def test_what_fails_does_not_stop_the_others(tmp_path, capsys):
    assert _call(tmp_path, "dkd", "student") == 1
    assert "the teacher is not trained yet" in (tmp_path / "dkd-seed0" / "failed.txt").read_text()
    assert (tmp_path / "student-seed0" / "result.json").is_file()
    assert _call(tmp_path, "dkd", "student") == 1  # not tried again
    assert "| dkd | 76.32 |  |  | failed |" in capsys.readouterr().out


def test_jobs_are_the_published_ones():
    assert list(papers.jobs()) == list(papers.PUBLISHED)
    with pytest.raises(SystemExit):
        papers.main(["--only", "nothing"])
