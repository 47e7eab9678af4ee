"""Taking clients out: exact against a run that never had them, quick, refused, erased."""

import pytest

from fedkd.config import ConfigError
from fedkd.rounds import experiment_context
from fedkd.runs.directory import RunDirectory
from fedkd.runs.events import ClientsErased, RoundFinished
from fedkd.simulations.local import run_local
from fedkd.studies import unlearning
from fedkd.training.evaluation import Scores
from tests.conftest import Tiny
from tests.simulations.faults import BAD_PAYLOADS, tampering

pytestmark = pytest.mark.usefixtures("lean")


QUIET = ("teachers.models=[mlp]", "rounds=2")


def unlearn(run: RunDirectory, *clients: int):
    new = unlearning.prepare(run, clients)
    return unlearning.distil_again(new, experiment_context(new.experiment))


@pytest.mark.parametrize("warm", ["true", "false"])
def test_the_student_is_that_of_a_run_that_never_had_the_client(tiny: Tiny, warm: str) -> None:
    experiment = tiny(*QUIET, f"distillation.warm_start={warm}")
    whole = run_local(experiment)
    never = run_local(experiment, client_app=tampering({1: BAD_PAYLOADS["nan"][0]}))
    server = unlearn(whole, 1)
    hashes = [r.hash for r in server.run.events(RoundFinished)]
    assert hashes == [r.hash for r in never.events(RoundFinished)]
    # Nor does it change one who never answered.
    assert [r.hash for r in unlearn(never, 1).run.events(RoundFinished)] == hashes
    assert hashes != [r.hash for r in whole.events(RoundFinished)]
    assert server.run.events(RoundFinished)[-1].answered == [0, 2]
    assert server.run.read_json("lineage.json") == {
        "source": whole.identity, "without": [1], "mode": "exact",
    }  # fmt: skip


def test_an_interrupted_removal_goes_on_in_the_same_folder(tiny: Tiny) -> None:
    whole = run_local(tiny(*QUIET))
    new = unlearning.prepare(whole, [2])
    space = experiment_context(new.experiment)

    def stop(event: str, **facts: object) -> None:
        if event == "round_start" and facts["round"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        unlearning.distil_again(new, space, stop)
    again = unlearning.prepare(whole, [2])
    assert again.path == new.path
    resumed = unlearning.distil_again(again, space)
    assert [r.round for r in resumed.run.events(RoundFinished)] == [1, 2]
    fresh = unlearning.prepare(whole, [2], whole.path / "elsewhere")
    assert (
        unlearning.distil_again(fresh, space).run.events(RoundFinished)[-1].hash
        == resumed.run.events(RoundFinished)[-1].hash
    )


def test_evidence_compares_the_students_and_the_opinions(tiny: Tiny) -> None:
    whole = run_local(tiny(*QUIET, "distillation.epochs=10"))
    assert unlearning.find_exact(whole, [0]) is None
    facts = unlearning.evidence(whole, unlearn(whole, 0), [0])
    assert set(facts["students"]) == {"before", "after"}
    assert facts["students"]["after"]["agrees_with_after"] == 1.0
    assert not facts["influenced"]
    compared = facts["opinions"][0]
    assert compared["round"] == 2
    # The student that learnt from the client is closer to it than the one that did not.
    assert compared["before"]["divergence"] < compared["after"]["divergence"]
    exact = unlearning.find_exact(whole, [0])
    space = experiment_context(whole.experiment)
    quick = unlearning.continue_without(whole, [0], space)
    measured = unlearning.evidence(whole, quick, [0], exact=exact)
    assert measured["mode"] == "quick"
    assert measured["students"]["exact"]["accuracy"] == facts["students"]["after"]["accuracy"]
    assert 0 <= measured["students"]["exact"]["agrees_with_after"] <= 1
    # A student that went on from one who knew the client is not clean of it.
    assert [other.path for other in unlearning.tainted(whole, [0])] == [quick.run.path]
    assert len(unlearning.tainted(whole, [0, 1])) == 2
    # The quick way took the source's student along and left the source alone.
    assert len(quick.run.events(RoundFinished)) == 1
    assert whole.load_checkpoint()["round"] == 2


@pytest.mark.parametrize(
    ("clients", "message"),
    [
        ([3], "--client 3: this run's clients are 0 to 2"),
        ([], "at least one"),
        ([0, 1, 2], "leave at least one"),
    ],
)
def test_impossible_requests_are_refused(tiny: Tiny, clients: list[int], message: str) -> None:
    run = RunDirectory.new(tiny())
    run.record(RoundFinished(round=1, student=Scores(accuracy=0.5), answered=[0]))
    run.knowledge(1).folder.mkdir(parents=True)
    with pytest.raises(ConfigError, match=message):
        unlearning.check_removal(run, clients)


def test_feedback_is_refused_unless_accepted(tiny: Tiny) -> None:
    run = RunDirectory.new(tiny("teachers.feedback.use=regulariser"))
    for number in (1, 2):
        run.record(RoundFinished(round=number, student=Scores(accuracy=0.5)))
        run.knowledge(number).folder.mkdir(parents=True)
    with pytest.raises(ConfigError, match="does not remove them entirely"):
        unlearning.check_removal(run, [0])
    unlearning.check_removal(run, [0], influenced=True)


def test_knowledge_that_is_gone_is_named(tiny: Tiny) -> None:
    run = RunDirectory.new(tiny())
    with pytest.raises(ConfigError, match="has no finished round"):
        unlearning.finished_rounds(run)
    run.record(RoundFinished(round=1, student=Scores(accuracy=0.5), answered=[0]))
    with pytest.raises(ConfigError, match="the knowledge of round 1 is gone"):
        unlearning.check_removal(run, [0])


def test_erasing_leaves_nothing_of_the_client_and_the_new_run_whole(tiny: Tiny) -> None:
    """Its answers about the server's labelled images go as well."""
    validated = ("fusion=[learned_gate]", "data.validation=30")
    whole = run_local(tiny(*QUIET, *validated))
    server = unlearn(whole, 1)
    paths = unlearning.erasable(whole, [1])
    names = {str(path.relative_to(whole.path)) for path in paths}
    assert {
        "knowledge/round-0001/transfer/client-0001", "knowledge/round-0002/test/client-0001",
        "knowledge/round-0001/validation/client-0001", "knowledge/round-0001/transfer/fused",
        "clients/client-0001",
        "checkpoints/round-0001.pt", "checkpoints/round-0002.pt",
    } <= names  # fmt: skip
    unlearning.erase(whole, paths, [1])
    assert unlearning.erasable(whole, [1]) == []
    assert not list(whole.path.rglob("client-0001"))
    assert whole.load_checkpoint() is None
    assert whole.events(ClientsErased)[0].clients == [1]
    # The links of the new run do not lead into what was deleted.
    assert server.answered(2) == [0, 2]
    server.fuse(2)
    kept = whole.knowledge(1).clients()
    assert kept == [0, 2]
