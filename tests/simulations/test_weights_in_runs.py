"""Networks that begin with local files, in federated runs: teachers, student, both ends."""

import json
from pathlib import Path

import pytest
import torch

from fedkd.config import Component, ConfigError, Experiment
from fedkd.io.tensors import file_hash
from fedkd.models.network import Network
from fedkd.privacy.policy import PolicyRefused, check_config
from fedkd.rounds import ExperimentContext
from fedkd.rounds.context import _CONTEXTS
from fedkd.runs.directory import RunDirectory
from fedkd.runs.events import Warned
from fedkd.runs.export import load_student
from fedkd.simulations.local import run_local
from fedkd.simulations.ray import run_ray
from fedkd.strategies.records import WEIGHTS, other_weights
from tests.conftest import Tiny
from tests.simulations.test_policy import node, strictest

pytestmark = pytest.mark.usefixtures("lean")


def saved(experiment: Experiment, model: str, path: Path) -> Network:
    """A network like those of the run, with other weights, in a file."""
    network = ExperimentContext(experiment).network(Component(name=model), "saved")
    torch.save({"model": model, "weights": network.state_dict()}, path)
    return network


@pytest.fixture
def begins(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Experiment:
    """Teachers and student that begin with the same file, found below FEDKD_DATA."""
    monkeypatch.setenv("FEDKD_DATA", str(tmp_path))
    saved(tiny(), "cnn_tiny", tmp_path / "net.pt")
    entry = "{name: cnn_tiny, weights: net.pt}"
    return tiny(f"teachers.models=[{entry}]", f"student.model={entry}")


def student(run: RunDirectory) -> str:
    return str(run.read_json("summary.json")["hash"])


def test_teachers_and_student_begin_with_a_file(
    begins: Experiment, tiny: Tiny, tmp_path: Path
) -> None:
    context = ExperimentContext(begins)
    first = context.network(begins.teachers.models[0], "teacher", 2)
    last = context.network(begins.student.model, "student")
    assert all(torch.equal(first.state_dict()[k], t) for k, t in last.state_dict().items())
    run = run_local(begins)
    versions = json.loads((run.path / "versions.json").read_text())
    assert versions["weights net.pt"] == file_hash(tmp_path / "net.pt")
    plain = run_local(tiny("teachers.models=[cnn_tiny]", "student.model=cnn_tiny"))
    assert student(run) != student(plain)
    # The student is there without the file.
    (tmp_path / "net.pt").unlink()
    assert len(load_student(RunDirectory.open(run.path)).state_dict()) == len(last.state_dict())


def test_a_run_goes_on_with_the_same_file_only(
    begins: Experiment, tiny: Tiny, tmp_path: Path
) -> None:
    class Stopped(Exception):
        pass

    def stop(event: str, **facts: object) -> None:
        if event == "round_start" and facts["round"] == 2:
            raise Stopped

    whole = run_local(begins)
    with pytest.raises(Stopped):
        run_local(begins, notify=stop)
    (half,) = [p for p in whole.path.parent.iterdir() if p != whole.path]
    content = (tmp_path / "net.pt").read_bytes()
    saved(tiny("seed=5"), "cnn_tiny", tmp_path / "net.pt")
    _CONTEXTS.clear()
    with pytest.raises(ConfigError, match=r"the weights in net\.pt are not those that it began"):
        run_local(begins, run=RunDirectory.open(half))
    (tmp_path / "net.pt").write_bytes(content)
    _CONTEXTS.clear()
    assert student(run_local(begins, run=RunDirectory.open(half))) == student(whole)


def test_a_new_head_is_said(begins: Experiment, tiny: Tiny, tmp_path: Path) -> None:
    network = ExperimentContext(tiny()).network(Component(name="cnn_tiny"), "saved")
    state = {k: t for k, t in network.body.state_dict().items() if not k.startswith("head.")}
    torch.save(state, tmp_path / "headless.pt")
    entry = "{name: cnn_tiny, weights: headless.pt}"
    run = run_local(tiny(f"teachers.models=[{entry}]", "rounds=1"))
    (warning,) = [e.text for e in run.events(Warned) if "headless" in e.text]
    assert warning == ("headless.pt: it has no head; cnn_tiny for 4 classes starts with a new head")


@pytest.mark.parametrize("key", ["teachers.models", "student.model", "distillation.assistants"])
def test_a_file_that_does_not_fit_is_named_with_its_key(
    begins: Experiment, tiny: Tiny, key: str
) -> None:
    entry = "{name: mlp, weights: net.pt}"
    word = f"{key}={entry}" if key == "student.model" else f"{key}=[{entry}]"
    expected = (
        rf"^{key}(\.0)?: .*net\.pt does not fit mlp for 4 classes \(the file is of cnn_tiny\)"
    )
    with pytest.raises(ConfigError, match=expected):
        ExperimentContext(tiny(word))
    with pytest.raises(ConfigError, match=r"there is no file .*other\.pt"):
        ExperimentContext(tiny(word.replace("net.pt", "other.pt")))


def test_a_node_needs_its_own_file_only(begins: Experiment, tiny: Tiny) -> None:
    both = "[{name: cnn_tiny, weights: net.pt}, {name: mlp, weights: elsewhere.pt}]"
    experiment = tiny(f"teachers.models={both}", "student.model=cnn_tiny")
    assert set(ExperimentContext(experiment, node=0).weights) == {"net.pt"}
    with pytest.raises(ConfigError, match=r"teachers\.models\.1: there is no file"):
        ExperimentContext(experiment, node=1)


def test_a_node_begins_with_the_servers_file(
    begins: Experiment, tiny: Tiny, tmp_path: Path
) -> None:
    (tmp_path / "node").mkdir()
    ask = node(tmp_path / "node", strictest(begins))
    ours = ExperimentContext(begins).weights
    facts = ask("query.describe", begins)["describe"]
    assert json.loads(str(facts[WEIGHTS])) == ours
    assert "metrics" in ask("train", begins, weights=json.dumps(ours))
    with pytest.raises(RuntimeError, match=r"client 0 begins with other weights .* net\.pt"):
        ask("train", begins, round=2, weights=json.dumps({"net.pt": 64 * "0"}))
    assert other_weights(ours, facts[WEIGHTS]) is None
    for theirs in (None, "[", "[]", json.dumps({"net.pt": "0"})):
        assert "net.pt (SHA-256" in str(other_weights(ours, theirs))


@pytest.mark.parametrize("path", ["/etc/passwd", "../other.pt", "~/secret.pt"])
def test_a_node_opens_no_file_of_the_servers_choice(
    begins: Experiment, tiny: Tiny, tmp_path: Path, path: str
) -> None:
    wrong = tiny(f"teachers.models=[{{name: cnn_tiny, weights: {path}}}]")
    models = (*wrong.teachers.models, wrong.student.model)
    policy = strictest(begins).model_copy(update={"models": models})
    with pytest.raises(PolicyRefused, match="reads files below its own data-root only"):
        check_config(policy, wrong)


@pytest.mark.slow
@pytest.mark.parametrize("peft", [False, True])
def test_ray_comes_to_the_same_student(begins: Experiment, tiny: Tiny, peft: bool) -> None:
    if peft:
        entry = "{name: cnn_tiny, weights: net.pt, peft: lora}"
        models = (f"teachers.models=[{entry}]", f"student.model={entry}")
        begins = tiny(*models, "teachers.feedback.use=init")
    assert student(run_ray(begins)) == student(run_local(begins))
