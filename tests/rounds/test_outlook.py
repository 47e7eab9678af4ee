"""What is known of a promise before a run begins."""

import math

import pytest
from dp_accounting import dp_event
from dp_accounting.rdp import RdpAccountant

from fedkd.build import check
from fedkd.config import ConfigError, make_experiment
from fedkd.privacy.accounting import Steps, epsilon
from fedkd.privacy.plan import Proposal, plan
from fedkd.privacy.release.gaussian import epsilon_of, mu_of
from fedkd.rounds.outlook import Outlook, outlook, several, together
from tests.conftest import Tiny

QUIET = ("fusion=[uniform]", "distillation.losses=[ce]", "evaluation.clients=false",
         "evaluation.teachers=false", "evaluation.baselines=[]")  # fmt: skip


def test_dp_sgd_has_the_noise_of_its_plan_beside_an_expected_batch(tiny: Tiny) -> None:
    privacy = "teachers.privacy={epsilon: 4.0, delta: 0.001, nominal_size: 40, accountant: rdp}"
    ahead = outlook(tiny(privacy, "teachers.models=[mlp]", "teachers.batch_size=20", *QUIET))
    assert (ahead.mechanism, ahead.signal, ahead.rounds) == ("dp_sgd", 20.0, 2)
    assert ahead.asked == "4 steps at rate 0.5"
    assert 3.9 < ahead.spent(2) <= 4.0
    assert ahead.spent(1) < ahead.spent(2)
    assert ahead.ratio == ahead.noise / 20


@pytest.mark.parametrize(
    ("asked", "words", "count"),
    [
        ("queries: 24", "24 images", 24),
        ("cells: 6", "6 cells", 6),
        ("unit: client", "48 images", 48),
    ],
)
def test_a_release_has_the_noise_on_a_vote_beside_all_votes(
    tiny: Tiny, asked: str, words: str, count: int
) -> None:
    release = f"release={{name: gnmax, epsilon: 5.0, min_votes: 3, {asked}}}"
    ahead = outlook(tiny(release, *QUIET))
    assert (ahead.asked, ahead.signal) == (words, 3)
    assert ahead.noise == pytest.approx(math.sqrt(2 * count * 2) / mu_of(5.0, 1e-5))
    assert ahead.spent(2) == pytest.approx(5.0, rel=1e-6)


def test_where_nothing_is_promised_there_is_nothing_to_plan(tiny: Tiny) -> None:
    assert outlook(tiny()) is None
    assert several([]) == ""


def test_a_budget_that_pays_for_no_answer_is_refused_before_the_first_round(tiny: Tiny) -> None:
    poor = "release={name: confident_gnmax, epsilon: 0.5, min_votes: 3}"
    with pytest.raises(ConfigError, match=r"epsilon 0\.5 in 2 rounds pays for 0 answers a round"):
        check(tiny(poor, *QUIET))


def test_several_runs_are_composed_and_not_the_worst_of_them() -> None:
    votes = Outlook("gnmax", "", 1.0, 60, 1, 1e-4, mu=mu_of(2.0, 1e-4))
    steps = Steps(0.5, 4.0, 10)
    teachers = Outlook("dp_sgd", "", 4.0, 160, 3, 1e-5, steps=steps)
    alone, _ = together([votes] * 9)
    assert alone == pytest.approx(epsilon_of(3 * mu_of(2.0, 1e-4), 1e-4))
    spent, delta = together([votes] * 9 + [teachers] * 2)
    other = RdpAccountant([1 + x / 10.0 for x in range(1, 100)] + list(range(12, 64)))
    other.compose(dp_event.GaussianDpEvent(1 / votes.mu), 9)
    sampled = dp_event.PoissonSampledDpEvent(0.5, dp_event.GaussianDpEvent(4.0))
    other.compose(sampled, 60)
    assert spent == pytest.approx(other.get_epsilon(1e-4), rel=2e-3)
    assert delta == 1e-4
    assert alone < spent < alone + epsilon([Steps(0.5, 4.0, 60)], 1e-5)  # composed, not added
    assert several([votes] * 9).startswith("9 private runs on the same images are 9 promises")


def test_a_proposal_is_a_section_that_can_be_planned() -> None:
    few = Proposal.of(320, 1.0, 1e-4)
    assert (few.directions, few.steps) == (12, 5)
    assert Proposal.of(320, 2.0, 1e-4).directions == 16
    assert Proposal.of(320, 10.0, 1e-4).steps == 14
    assert Proposal.of(2000, 2.0).teachers["optimizer"]["lr"] == 40.0
    values = {"teachers": Proposal.of(320, 2.0).teachers, "rounds": 2}
    planned = plan(make_experiment(values, []))
    assert (planned.mechanism.sample_rate, planned.mechanism.steps) == (1.0, 5)
    assert (planned.epsilon, planned.delta) == (2.0, 1e-4)
    with pytest.raises(ConfigError, match=r"teachers\.privacy\.delta"):
        Proposal.of(100, 1.0, 0.05)
