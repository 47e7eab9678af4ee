"""Folders from elsewhere, torn files and a second writer: nothing is deleted, run or made up."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedkd.config import ConfigError
from fedkd.io.lock import Busy, Lock
from fedkd.knowledge.query import Images
from fedkd.runs.directory import RunDirectory, Session
from fedkd.runs.events import Warned
from fedkd.simulations.cli.main import _place_working_directory, app
from fedkd.simulations.failures import failure_of
from fedkd.simulations.local import run_local
from tests.conftest import TINY, Tiny

QUICK = ("evaluation.baselines=[]", "teachers.epochs=1", "distillation.epochs=1")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, which tests copy before they harm it."""
    from fedkd.config import make_experiment

    place = tmp_path_factory.mktemp("finished")
    return run_local(make_experiment(TINY, [f"output={place}", *QUICK])).path


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """A copy of it under its own name, which is its identity."""
    return Path(shutil.copytree(finished, tmp_path / finished.name))


def cut_back(run: Path, last_round: int = 1) -> None:
    """Make of a finished run one that was killed after `last_round` was done."""
    for number in range(last_round + 1, 10):
        (run / "checkpoints" / f"round-{number:04d}.pt").unlink(missing_ok=True)
    (run / "summary.json").unlink()


def go_on(path: Path) -> str:
    run = RunDirectory.open(path)
    run_local(run.experiment, run=run)
    return str(run.read_json("summary.json")["hash"])


def hash_of(path: Path) -> str:
    return str(json.loads((path / "summary.json").read_text())["hash"])


def refusal(*words: str) -> str:
    """The one line that a command ends with."""
    result = CliRunner().invoke(app, [*words])
    assert result.exception is not None, result.output
    assert not isinstance(result.exception, SystemExit), result.output
    failure = failure_of(result.exception)
    assert failure.code in (1, 2), failure.text
    return failure.text


# -- folders from elsewhere ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "verb", ["report", "status", "contribution", "audit", "quarantine", "export", "predict"]
)
def test_a_link_in_a_run_is_refused_and_what_it_points_to_stays(
    verb: str, copied: Path, tmp_path: Path
) -> None:
    victim = tmp_path / "victim"
    for name in (".ssh", ".config", ".client-0001"):
        (victim / name).mkdir(parents=True)
    place = copied / "knowledge" / "round-0002" / "transfer"
    shutil.rmtree(place)
    place.symlink_to(victim)
    more = [str(victim)] if verb == "predict" else []
    assert re.search("transfer is damaged .a symbolic link", refusal(verb, str(copied), *more))
    assert len([*victim.iterdir()]) == 3


@pytest.mark.parametrize("name", ["metrics.jsonl", "run.log", "checkpoints/round-0002.pt"])
def test_files_that_are_links_or_pipes_are_refused(name: str, copied: Path, tmp_path: Path) -> None:
    (copied / name).unlink(missing_ok=True)
    (copied / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match=f"{name} is damaged .a symbolic link"):
        RunDirectory.open(copied)
    (copied / name).unlink()
    os.mkfifo(copied / name)
    with pytest.raises(ConfigError, match=f"{name} is damaged .neither a file nor a folder"):
        RunDirectory.open(copied)


def test_looking_at_a_run_changes_nothing_in_it(copied: Path) -> None:
    for clutter in (".DS_Store", ".nfs00012", ".client-0002"):
        (copied / "knowledge" / "round-0001" / "transfer" / clutter).touch()
    shutil.rmtree(copied / "knowledge" / "round-0002" / "test")
    torn = copied / "checkpoints" / "round-0002.pt"
    torn.write_bytes(torn.read_bytes()[:100])
    before = {p: p.stat().st_mtime_ns for p in copied.rglob("*") if p.is_file()}
    run = RunDirectory.open(copied)
    for number in (1, 2, 3):
        for images in Images:
            run.knowledge(number, images).clients()
    run.load_checkpoint()
    assert CliRunner().invoke(app, ["status", str(copied)]).exit_code == 0
    assert {p: p.stat().st_mtime_ns for p in copied.rglob("*") if p.is_file()} == before
    assert not (copied / "knowledge" / "round-0003").exists()


VERBS = ["report", "status", "contribution", "audit", "quarantine", "export", "unlearn", "run"]


@pytest.mark.parametrize("verb", VERBS)
def test_no_plugin_of_a_run_is_imported_unless_it_is_trusted(
    verb: str, copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, mark = f"evil_{verb}", tmp_path / "it_ran"
    (tmp_path / f"{name}.py").write_text(f"open({str(mark)!r}, 'w').close()\nraise ValueError\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    config = (copied / "config.yaml").read_text()
    (copied / "config.yaml").write_text(config.replace("plugins: []", f"plugins: [{name}]"))
    signature = json.loads((copied / "signature.json").read_text())
    del signature["checksum"]
    signature["student"]["name"] = "evil_model"
    signature["plugins"] = {name: ""}
    (copied / "signature.json").write_text(json.dumps(signature))
    words = {"run": ["run", "--resume", str(copied), "--runner", "local"]}.get(
        verb, [verb, str(copied)]
    )
    words += ["--client", "1"] if verb == "unlearn" else []
    if verb in ("report", "status", "quarantine"):  # need none
        assert CliRunner().invoke(app, words).exit_code == 0
    else:
        text = refusal(*words)
        assert f"plugin '{name}' is not imported" in text
        assert "--trust" in text
    assert not mark.exists()
    if verb not in ("status", "quarantine"):
        CliRunner().invoke(app, [*words, "--trust"])
        assert mark.exists()


def test_the_working_directory_is_searched_only_for_configs_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for words, searched in (
        (["report", "."], False),
        (["report", ".", "--trust"], True),
        (["predict", ".", "a.png"], False),
        (["run", "--resume", "."], False),
        (["run", "--resume=."], False),
        (["run", "--resume", ".", "--trust"], True),
        (["run", "mine.yaml"], True),
    ):
        monkeypatch.setattr(sys, "path", ["", "/elsewhere"])
        _place_working_directory(words)
        assert (str(tmp_path) in sys.path) == searched, words
        assert "" not in sys.path
        assert sys.path[0] == "/elsewhere"


# -- torn files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("harm", ["flipped", "cut", "empty", "swapped", "other"])
def test_a_checkpoint_that_is_not_what_was_written_is_passed_over(
    harm: str, copied: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A flipped bit used to give another student without a word."""
    import torch

    expected = hash_of(copied)
    cut_back(copied, last_round=2)
    file, first = (copied / "checkpoints" / f"round-{n:04d}.pt" for n in (2, 1))
    content = file.read_bytes()
    middle = content.find(b"FB") + 400  # in the weights
    flipped = bytes([*content[:middle], content[middle] ^ 64, *content[middle + 1 :]])
    if harm == "other":
        torch.save({"weights": {}}, file)
    else:
        harmed = {"flipped": flipped, "cut": content[:900], "empty": b""}
        file.write_bytes(harmed.get(harm, first.read_bytes()))
    state = RunDirectory.open(copied).load_checkpoint()
    assert state["round"] == 1
    assert "round-0002.pt is passed over" in caplog.text
    assert go_on(copied) == expected
    texts = [r.text for r in RunDirectory.open(copied).events(Warned)]
    assert any("round-0002.pt is passed over" in text for text in texts)


@pytest.mark.parametrize("harm", ["empty", "cut", "gone", "flipped", "facts"])
def test_a_client_whose_answer_the_disk_lost_is_asked_again(harm: str, copied: Path) -> None:
    expected = hash_of(copied)
    cut_back(copied)
    place = copied / "knowledge" / "round-0002" / "transfer" / "client-0001"
    file = place / ("teacher.json" if harm == "facts" else "logits.npy")
    content = file.read_bytes()
    if harm == "gone":
        file.unlink()
    else:
        harmed = {"cut": content[:-9], "flipped": content[:-1] + bytes([content[-1] ^ 1])}
        file.write_bytes(harmed.get(harm, b""))
    (copied / "knowledge" / "round-0002" / "transfer" / ".client-0002").mkdir()
    (copied / "knowledge" / "round-0002" / "transfer" / ".DS_Store").touch()
    assert go_on(copied) == expected
    texts = [r.text for r in RunDirectory.open(copied).events(Warned)]
    assert any("client 1 is asked again" in text for text in texts)


def test_a_teacher_that_the_disk_lost_is_trained_again(copied: Path) -> None:
    expected = hash_of(copied)
    cut_back(copied)
    shutil.rmtree(copied / "knowledge" / "round-0002")
    file = copied / "clients" / "client-0001" / "teacher-0002.pt"
    file.write_bytes(file.read_bytes()[:500])
    assert go_on(copied) == expected


def test_damaged_knowledge_of_a_finished_run_is_named(copied: Path) -> None:
    file = copied / "knowledge" / "round-0002" / "transfer" / "client-0001" / "logits.npy"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    for words in (["contribution", str(copied)], ["unlearn", str(copied), "--client", "0"]):
        assert re.search("client-0001/logits.npy is damaged .not what was written", refusal(*words))


def test_a_ledger_line_cut_by_a_crash_is_dropped_and_counted(copied: Path) -> None:
    cut_back(copied)
    before = len((copied / "ledger.jsonl").read_text().splitlines())
    with (copied / "ledger.jsonl").open("a") as file:
        file.write('{"round": 2, "pha')
    go_on(copied)
    run = RunDirectory.open(copied)
    entries = run.messages()
    assert len(entries) == len((copied / "ledger.jsonl").read_text().splitlines()) > before
    assert any("one message are not counted" in r.text for r in run.events(Warned))


def test_a_config_that_was_changed_is_not_gone_on_with(copied: Path) -> None:
    cut_back(copied)
    file = copied / "config.yaml"
    text = file.read_text()
    file.write_text("# a remark changes nothing\n" + text)
    RunDirectory.open(copied).check_config()
    file.write_text(text.replace("seed: 0", "seed: 1"))
    for words in (["--runner", "local"], []):
        line = refusal("run", "--resume", str(copied), *words)
        assert "config.yaml was changed since the run began" in line
    run = RunDirectory.open(copied)
    with pytest.raises(ConfigError, match="put it back to go on, or start a new run"):
        run_local(run.experiment, run=run)


# -- one writer ------------------------------------------------------------------------------------

HOLD = "import sys; from pathlib import Path; from fedkd.io.lock import Lock\n" \
    "with Lock(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"  # fmt: skip


def test_a_second_writer_is_refused_until_the_first_one_ends(copied: Path) -> None:
    """Two resumes of one run both went on, with every round twice in its metrics."""
    cut_back(copied)
    first = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(copied)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert first.stdout.readline() == b"held\n"
    try:
        line = refusal("run", "--resume", str(copied), "--runner", "local")
        assert f"process {first.pid}" in line
        assert "is at work on it" in line
        run = RunDirectory.open(copied)
        with pytest.raises(Busy, match="is at work on it"):
            run_local(run.experiment, run=run)
        assert CliRunner().invoke(app, ["status", str(copied)]).exit_code == 0
    finally:
        first.kill()
        first.communicate()
    with Session(RunDirectory.open(copied)):
        pass


def test_who_holds_the_lock_may_enter_it_again(tmp_path: Path) -> None:
    mine = Lock(tmp_path)
    with mine, mine, pytest.raises(Busy), Lock(tmp_path):
        pass
    with Lock(tmp_path):
        pass


def test_children_do_not_keep_the_lock(tmp_path: Path) -> None:
    """Ray's processes outlive a server that is killed."""
    with Lock(tmp_path):
        child = subprocess.Popen(
            [sys.executable, "-c", "import sys; sys.stdin.read()"],
            stdin=subprocess.PIPE, close_fds=False,
        )  # fmt: skip
    try:
        with Lock(tmp_path):
            pass
    finally:
        child.communicate()


def test_studies_have_one_writer_too(tiny: Tiny, tmp_path: Path) -> None:
    from fedkd.studies.attack.config import AttackConfig
    from fedkd.studies.attack.study import AttackStudy
    from fedkd.studies.engine import StudyFolder, run_study

    study = AttackStudy(AttackConfig(experiment=tiny()))
    with Lock(tmp_path), pytest.raises(Busy):
        run_study(study, StudyFolder(tmp_path, study.config))
