"""The audit of the mechanism passes what is right and refutes what is broken, on both paths."""

from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from fedkd.config import ConfigError, Experiment
from fedkd.privacy.clipping import Clipping
from fedkd.privacy.dp_sgd import Mechanism
from fedkd.privacy.label_dp import randomised
from fedkd.privacy.noise import SecureGenerator
from fedkd.rounds import Client, ExperimentContext, experiment_context
from fedkd.runs.directory import RunDirectory
from fedkd.runs.events import RoundFinished
from fedkd.simulations.cli.main import app
from fedkd.studies.audit.finding import Finding, overall
from fedkd.studies.audit.lies import of_labels
from fedkd.studies.audit.mechanism import audit_mechanism
from fedkd.studies.audit.noisy_steps import of_dp_sgd, told_apart
from fedkd.training.evaluation import Scores
from tests.conftest import Tiny
from tests.studies.audit.breaks import BREAKS, broken

pytestmark = pytest.mark.usefixtures("lean")

# Each test fits one that is broken at least; the run has several rounds of one step.
SEEN_BY = {
    "none": set(),
    "no clipping": {"sensitivity"},
    "noise / 4": {"noise"},
    "noise every second step": {"noise"},
    "the batch's mean clipped": {"sensitivity"},
    "noise of a known key": {"noise"},
}
QUIET = (
    "teachers.models=[mlp]", "fusion=[entropy]", "evaluation.clients=false", "data.private=60",
    "distillation.epochs=1", "teachers.epochs=1",
)  # fmt: skip


def refuting(findings: list[Finding], path: str) -> set[str]:
    return {f.test for f in findings if f.path == path and f.verdict == "refuted"}


@pytest.mark.parametrize("name", BREAKS)
@pytest.mark.parametrize("clipping", ["hooks", "ghost"])
def test_every_break_is_refuted_on_both_paths_and_nothing_else_is(
    name: str, clipping: Clipping
) -> None:
    mechanism = Mechanism(0.5, 2.0, 2, 1.5, max_grad_norm=0.3, clipping=clipping)
    with broken(name):
        _, found = of_dp_sgd(mechanism, 1, together=True, delta=1e-5, trainings=40)
    assert {finding.path for finding in found} == {"one by one", "together"}
    for path in ("one by one", "together"):
        seen = refuting(found, path)
        assert SEEN_BY[name] <= seen
        assert bool(seen) == (name != "none")
    assert overall(found) == ("consistent" if name == "none" else "refuted")


def test_noise_that_ends_with_the_first_round_shows_in_the_long_trainings() -> None:
    normal, drawn = SecureGenerator.normal, {}

    def at_first(self: SecureGenerator, shape: tuple[int, ...], deviation: float) -> Tensor:
        drawn[id(self)] = (self, drawn.get(id(self), (self, 0))[1] + 1)
        return normal(self, shape, deviation if drawn[id(self)][1] <= 12 else 0.0)

    with mock.patch.object(SecureGenerator, "normal", at_first):
        _, found = of_dp_sgd(
            Mechanism(1.0, 4.0, 20, 1.0), 2, together=False, delta=1e-5, trainings=20
        )
    refuted = [finding for finding in found if finding.verdict == "refuted"]
    assert [(finding.test, finding.over) for finding in refuted] == [("noise", "4 x all 40 steps")]


def test_a_wrong_sampling_rate_is_refuted(monkeypatch: pytest.MonkeyPatch) -> None:
    bernoulli = SecureGenerator.bernoulli
    monkeypatch.setattr(
        SecureGenerator,
        "bernoulli",
        lambda self, p, count: bernoulli(self, min(1.0, 1.5 * p), count),
    )
    _, found = of_dp_sgd(Mechanism(0.4, 4.0, 4, 1.0), 1, together=False, delta=1e-5, trainings=20)
    assert "sampling rate" in refuting(found, "one by one")


def test_without_noise_there_is_nothing_to_audit() -> None:
    with pytest.raises(ConfigError, match="--noise-multiplier: expected more than 0"):
        of_dp_sgd(Mechanism(1.0, 4.0, 2, 0.0), 1, together=False, delta=1e-5)


def test_a_bound_from_scores_by_hand() -> None:
    apart, delta = np.arange(400.0), 1e-5
    # 300 are counted: none wrong, which leaves 1 - (alpha / 2)^(1 / 300) for both errors.
    error = 1 - 0.025 ** (1 / 300)
    best = np.log((1 - error - delta) / error)
    assert told_apart(apart + 1000, apart, delta, 0.05) == pytest.approx((best, best))
    draws = np.random.default_rng(0)
    alike = told_apart(draws.normal(size=400), draws.normal(size=400), delta, 0.05)
    assert alike == (0.0, pytest.approx(best))


def test_the_bound_on_a_gaussian_stays_below_its_epsilon_and_comes_close() -> None:
    # mu = 2: epsilon 9.6 at delta 1e-5, and at most 20000 guesses show some of it.
    draws = np.random.default_rng(1)
    bound, _ = told_apart(draws.normal(size=20_000) + 2, draws.normal(size=20_000), 1e-5, 1e-3)
    assert 3 < bound < 9.6


def test_randomised_response_passes_and_broken_ones_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    for epsilon, classes in ((0.5, 2), (2.0, 10)):
        found = of_labels(epsilon, classes, count=20_000)
        assert overall(found) == "consistent"
        assert len(found) == (3 if classes == 2 else 4)
    # Of a thousand labels that clients learnt, 45 % may be true.
    assert overall(of_labels(2.0, 10, (450, 1000), count=5000)) == "consistent"
    learnt = [f.test for f in of_labels(2.0, 10, (700, 1000), count=5000) if f.verdict == "refuted"]
    assert learnt == ["the run's labels kept"]

    def refuted_with(by: object) -> set[str]:
        monkeypatch.setattr("fedkd.studies.audit.lies.randomised", by)
        return {f.test for f in of_labels(1.0, 4, count=20_000) if f.verdict == "refuted"}

    truthful = refuted_with(lambda labels, classes, epsilon: labels)
    assert {"labels kept", "epsilon"} <= truthful
    larger = refuted_with(lambda labels, classes, epsilon: randomised(labels, classes, 2.0))
    assert {"labels kept", "epsilon"} <= larger
    known = refuted_with(
        lambda labels, classes, epsilon: randomised(
            labels, classes, epsilon, generator=SecureGenerator(1)
        )
    )
    assert known == {"drawn anew"}

    def next_class(labels: Tensor, classes: int, epsilon: float) -> Tensor:
        return torch.where(randomised(labels, classes, epsilon) == labels, labels, (labels + 1) % 4)

    assert "lies alike" in refuted_with(next_class)


def finished(experiment: Experiment) -> tuple[RunDirectory, ExperimentContext]:
    """A run of which only the server's record is there."""
    run = RunDirectory.new(experiment)
    run.record(RoundFinished(round=1, student=Scores(accuracy=0.5)))
    return run, experiment_context(experiment)


def test_the_labels_that_clients_learnt_are_audited(tiny: Tiny) -> None:
    run, space = finished(tiny(*QUIET, "teachers.privacy={mechanism: label_dp, epsilon: 1}"))
    shards = [
        Client(space, n, run.identity, run.clients / f"client-{n:04d}").budget.images()
        for n in range(3)
    ]
    found = audit_mechanism(run, space, 0)
    assert found["verdict"] == "consistent"
    tests = {finding["test"]: finding for finding in found["findings"]}
    assert tests["the run's labels kept"]["over"] == f"{sum(map(len, shards))} labels"


def test_what_has_no_mechanism_or_too_few_trainings_is_refused(tiny: Tiny) -> None:
    run, space = finished(tiny(*QUIET))
    with pytest.raises(ConfigError, match="neither with DP-SGD nor on randomised labels"):
        audit_mechanism(run, space, 0)
    with pytest.raises(ConfigError, match="--trainings: expected at least 50, got 49"):
        audit_mechanism(run, space, 0, trainings=49)
    what_if = audit_mechanism(
        run, space, 0, mechanism=Mechanism(1.0, 20.0, 1, 2.0), delta=1e-3, trainings=50
    )
    assert what_if["verdict"] == "consistent"
    assert what_if["claim"]["delta"] == 1e-3
    for given, message in (
        (["--trainings", "200"], "--trainings: is of the audit of the mechanism"),
        (["--mechanism", "--epsilon", "2"], "--epsilon: what a mechanism claims follows"),
    ):
        refused = CliRunner().invoke(app, ["audit", str(run.path), *given])
        assert str(refused.exception).startswith(message)
