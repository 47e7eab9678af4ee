"""Mechanisms at the aggregator: what they cost, what they let out, what they refuse."""

import math

import pytest
import torch
from dp_accounting import dp_event
from dp_accounting.pld import PLDAccountant
from torch import Tensor
from torch.nn.functional import one_hot

from fedkd.build import check
from fedkd.config import ConfigError
from fedkd.privacy.noise import SecureGenerator
from fedkd.privacy.release import RELEASES
from fedkd.privacy.release.base import Release, Released, Unit
from fedkd.privacy.release.cells import Cells
from fedkd.privacy.release.gaussian import delta_of, epsilon_of, mu_of
from fedkd.privacy.release.gnmax import ConfidentGNMax, GNMax
from fedkd.privacy.release.prob_sum import ProbSum
from fedkd.rounds import ExperimentContext, Server
from fedkd.runs.events import AnswersReleased, RoundFinished
from fedkd.runs.privacy_statement import statement
from fedkd.simulations.local import run_local
from tests.conftest import Tiny


@pytest.mark.parametrize(("epsilon", "mu"), [(1, 0.268), (2, 0.502), (5, 1.121), (10, 2.000)])
def test_mu_of_published_budgets(epsilon: float, mu: float) -> None:
    assert mu_of(epsilon, 1e-5) == pytest.approx(mu, abs=6e-4)
    assert epsilon_of(mu_of(epsilon, 1e-5), 1e-5) == pytest.approx(epsilon, rel=1e-6)


@pytest.mark.smoke
@pytest.mark.parametrize("epsilon", [0.01, 0.5, 3.0, 30.0, 200.0])
@pytest.mark.parametrize("delta", [1e-9, 1e-5, 1e-2])
def test_a_budget_is_never_overdrawn_and_hardly_left_over(epsilon: float, delta: float) -> None:
    mu = mu_of(epsilon, delta)
    assert delta_of(epsilon, mu) <= delta
    assert delta_of(epsilon, mu * 1.001) > delta


def _votes(teachers: int, queries: int, sure: float = 1.0) -> tuple[Tensor, Tensor]:
    """Each image of class q mod 4; a share `sure` of the teachers says so."""
    truth = torch.arange(queries) % 4
    votes = one_hot(truth, 4).float().expand(teachers, -1, -1).clone()
    for number in range(round(teachers * (1 - sure))):
        votes[number] = one_hot((truth + 1 + number % 3) % 4, 4).float()
    return votes, truth


def _noise() -> SecureGenerator:
    return SecureGenerator(0)


def _ask(release: Release, votes: Tensor, rounds: int = 1):
    return release(votes, torch.arange(votes.shape[1]), rounds, _noise())


@pytest.mark.parametrize("rounds", [1, 4])
@pytest.mark.parametrize("make", [GNMax, ProbSum])
def test_all_rounds_together_cost_the_budget(make: type[Release], rounds: int) -> None:
    release = make(epsilon=3.0, delta=1e-5)
    votes, _ = _votes(80, 60)
    mus = [_ask(release, votes, rounds).mu for _ in range(rounds)]
    assert epsilon_of(math.sqrt(sum(mu**2 for mu in mus)), 1e-5) == pytest.approx(3.0, rel=1e-6)


def test_the_noise_on_a_count_is_what_the_budget_asks() -> None:
    """epsilon 8, delta 1e-5, 138 queries: sigma is about 10, a fifth of 50 votes (notes, 3.1)."""
    assert GNMax(epsilon=8.0).deviation(138, 1) == pytest.approx(10.0, rel=0.01)
    flat = torch.full((200, 4000, 2), 0.5)
    release = ProbSum(epsilon=8.0, sharpness=1.0)
    scores = _ask(release, flat).scores.double()
    back = 200 * (scores[:, 0].log() - scores[:, 1].log())  # the difference of two noises
    expected = math.sqrt(2) * release.deviation(4000, 1)
    assert float(back.std()) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("name", RELEASES.names())
def test_many_agreeing_teachers_survive_the_noise_and_few_queries_need_less(name: str) -> None:
    votes, truth = _votes(300, 40)
    out = _ask(RELEASES.create(name, epsilon=8.0), votes)
    assert (out.scores.argmax(1) == truth[out.index]).double().mean() > 0.95
    assert torch.allclose(out.scores.sum(1), torch.ones(len(out.index)))
    assert out.index.tolist() == sorted(out.index.tolist())


@pytest.mark.parametrize("name", RELEASES.names())
def test_a_tiny_budget_leaves_nothing_to_read(name: str) -> None:
    votes, truth = _votes(60, 400)
    out = _ask(RELEASES.create(name, epsilon=0.01), votes)
    right = (out.scores.argmax(1) == truth[out.index]).double().sum()
    assert float(right) < 0.4 * 400


def test_confident_answers_where_teachers_agree_and_stops_before_the_budget() -> None:
    sure, _ = _votes(200, 60, sure=1.0)
    torn, _ = _votes(200, 60, sure=0.3)
    votes = torch.cat([sure, torn], dim=1)
    release = ConfidentGNMax(epsilon=20.0, noise=0.1)
    out = _ask(release, votes)
    assert (out.index < 60).double().mean() > 0.9
    assert epsilon_of(out.mu, 1e-5) <= 20.0
    poor = _ask(ConfidentGNMax(epsilon=1.0, noise=0.1), votes)
    assert len(poor.index) < len(out.index)
    assert epsilon_of(poor.mu, 1e-5) <= 1.0


@pytest.mark.parametrize("name", RELEASES.names())
def test_too_few_teachers_are_refused(name: str) -> None:
    votes, _ = _votes(10, 5)
    with pytest.raises(ValueError, match=r"10 teachers .* at least 50"):
        _ask(RELEASES.create(name, epsilon=1.0), votes)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"epsilon": 0.0}, "epsilon"),
        ({"epsilon": math.nan}, "epsilon"),
        ({"epsilon": math.inf}, "epsilon"),
        ({"epsilon": 1.0, "delta": 1.0}, "delta"),
        ({"epsilon": 1.0, "queries": 0}, "queries"),
        ({"epsilon": 1.0, "unit": "pixel"}, "unit"),
        ({"epsilon": 1.0, "cells": 1}, "cells must be at least 2"),
        ({"epsilon": 1.0, "cells": 9, "queries": 9}, "queries and cells both say"),
    ],
)
def test_impossible_budgets_are_named(options: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        GNMax(**options)


QUIET = (
    "evaluation.teachers=false",
    "evaluation.clients=false",
    "fusion=[uniform]",
    "evaluation.baselines=[oracle]",
)
LOSSES = ("distillation.losses=[ce]",)
GNMAX = "release={name: gnmax, epsilon: 50.0, min_votes: 3, queries: 24}"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ((GNMAX, *LOSSES, *QUIET, "evaluation.teachers=true"), "evaluation.teachers"),
        ((GNMAX, *LOSSES, *QUIET, "evaluation.clients=true"), "evaluation.clients"),
        ((GNMAX, *LOSSES, *QUIET, "evaluation.baselines=[ceiling]"), "evaluation.baselines"),
        ((GNMAX, *LOSSES, *QUIET[:2], "fusion=[class_gated]"), "fusion"),
        ((GNMAX, *QUIET, "distillation.losses=[dkd, vrm]"), "distillation.losses"),
        (("release={name: gnmix, epsilon: 1.0}", *LOSSES, *QUIET), "gnmax"),
        (
            (
                GNMAX.replace("queries: 24", "unit: client"),
                *LOSSES,
                *QUIET,
                "data.partition={name: sub_shards, each: 3}",
            ),
            r"release\.unit: an owner of several clients",
        ),
    ],
)
def test_what_would_leak_beside_the_mechanism_is_refused(
    tiny: Tiny, overrides: tuple[str, ...], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        check(tiny(*overrides))


def test_a_run_lets_out_labels_once_and_learns_from_those_only(tiny: Tiny) -> None:
    experiment = tiny(GNMAX, *LOSSES, *QUIET)
    run = run_local(experiment)
    events = run.events(AnswersReleased)
    assert [e.answered for e in events] == [24, 24]
    together = math.sqrt(sum(e.mu**2 for e in events))
    assert epsilon_of(together, 1e-5) == pytest.approx(50.0, rel=1e-6)
    rounds = run.events(RoundFinished)
    assert not rounds[-1].teachers
    assert rounds[-1].ensemble is None


def test_taking_a_round_up_again_does_not_draw_again(tiny: Tiny) -> None:
    experiment = tiny(GNMAX, *LOSSES, *QUIET)
    run = run_local(experiment)
    server = Server(ExperimentContext(experiment), run)
    first, second = server.fuse(2), server.fuse(2)
    assert torch.equal(first.probabilities, second.probabilities)
    assert torch.equal(first.index, second.index)
    assert len(first.probabilities) == 24


def _blobs(each: int = 12) -> Tensor:
    """Images of four kinds, one after the other, uint8 (4 * each, 1, 4, 4)."""
    pixels = torch.zeros(4, each, 1, 4, 4)
    for kind in range(4):
        pixels[kind, :, 0, kind] = 200
    noise = torch.rand(pixels.shape, generator=torch.Generator().manual_seed(0))
    return (pixels + 40 * noise).to(torch.uint8).flatten(0, 1)


def test_cells_hold_alike_images_and_are_the_same_everywhere() -> None:
    images = _blobs()
    cells = Cells.among(images, 4, 4, seed=7)
    assert torch.equal(cells.of, Cells.among(images.clone(), 4, 4, seed=7).of)
    kinds = cells.of.view(4, -1)
    assert (kinds == kinds[:, :1]).all()
    assert len(set(kinds[:, 0].tolist())) == len(cells) == 4
    # Nothing to tell apart: no more cells than different images.
    assert len(Cells.among(images[:1].expand(6, -1, -1, -1), 4, 4, seed=7)) == 1


@pytest.mark.parametrize("count", [2, 3, 5, 8])
@pytest.mark.parametrize("images", [2, 3, 5])
def test_a_handful_of_images_is_divided_too(images: int, count: int) -> None:
    cells = Cells.among(_blobs()[:: 48 // images][:images], count, 10, seed=7)
    assert len(cells.of) == images
    assert 1 <= len(cells) <= min(count, images)


def test_cells_follow_the_shape_of_a_class() -> None:
    """Two long classes side by side: k-means on the features would cut them across."""
    steps = torch.linspace(0, 200, 80)
    pixels = torch.zeros(2, 80, 1, 2, 2)
    pixels[:, :, 0, 0, 0] = steps
    pixels[1, :, 0, 1, 1] = 30
    cells = Cells.among(pixels.to(torch.uint8).flatten(0, 1), 2, 2, seed=7).of.view(2, -1)
    assert (cells == cells[:, :1]).all()
    assert cells[0, 0] != cells[1, 0]


def test_a_ballot_is_a_mean_answer_and_what_comes_out_spreads_over_its_cell() -> None:
    cells = Cells(torch.tensor([1, 0, 1, 2]))
    answers = torch.tensor([[[1.0, 0], [0.2, 0.8], [0.4, 0.6], [0, 1.0]]])
    expected = torch.tensor([[[0.2, 0.8], [0.7, 0.3], [0, 1.0]]])
    assert torch.allclose(cells.ballots(answers), expected)
    out = cells.spread(Released(torch.eye(2), torch.tensor([0, 1]), 0.5))
    assert (out.index.tolist(), out.mu) == ([0, 1, 2], 0.5)
    assert torch.equal(out.scores, torch.tensor([[0.0, 1], [1, 0], [0, 1]]))


@pytest.mark.parametrize("name", RELEASES.names())
def test_one_client_moves_a_cell_no_more_than_an_image(name: str) -> None:
    """A ballot is a probability vector: replaced, it moves the sum by sqrt 2 at most."""
    generator = torch.Generator().manual_seed(0)
    cells = Cells(torch.arange(40) % 5)
    answers = torch.softmax(50 * torch.randn(2, 40, 10, generator=generator), dim=-1)
    answers[:, :20] = one_hot(torch.tensor([0, 1]), 10).float()[:, None]  # all for one class
    ballots = cells.ballots(answers).double()
    assert float((ballots[0] - ballots[1]).norm(dim=1).max()) <= Release.sensitivity + 1e-9
    many = ballots.float().repeat(30, 1, 1)
    out = RELEASES.create(name, epsilon=3.0, cells=5)(many, torch.arange(5), 1, _noise())
    assert epsilon_of(out.mu, 1e-5) <= 3.0 + 1e-9


@pytest.mark.parametrize("unit", ["example", "client"])
@pytest.mark.parametrize("cells", [2, 10, 60, 400])
@pytest.mark.parametrize(("epsilon", "delta"), [(1.0, 1e-4), (2.0, 1e-5), (10.0, 1e-6)])
def test_cells_cost_what_so_many_gaussian_queries_cost(
    cells: int, epsilon: float, delta: float, unit: Unit
) -> None:
    """Twelve settings of each unit, against code that shares nothing with ours."""
    rounds = 2 if cells == 10 else 1
    release = GNMax(epsilon=epsilon, delta=delta, cells=cells, unit=unit)
    noise = release.deviation(cells, rounds) / release.sensitivity
    accountant = PLDAccountant(value_discretization_interval=1e-3)
    accountant.compose(dp_event.GaussianDpEvent(noise), cells * rounds)
    assert accountant.get_epsilon(delta) == pytest.approx(epsilon, rel=2e-3)


def test_how_many_cells_follows_from_public_facts_alone() -> None:
    auto = GNMax(epsilon=10.0, delta=1e-4, cells="auto")
    counts = [
        auto.how_many_cells(clients=60, rounds=1, classes=10, images=400),
        auto.how_many_cells(clients=120, rounds=4, classes=10, images=400),
        auto.how_many_cells(clients=60, rounds=100, classes=10, images=400),
        auto.how_many_cells(clients=10**6, rounds=1, classes=10, images=400),
    ]
    assert counts == [44, 44, 10, 400]
    assert GNMax(epsilon=10.0, cells=20).how_many_cells(60, 1, 10, 400) == 20


CELLS = "release={name: gnmax, epsilon: 50.0, min_votes: 3, cells: 6}"


def test_a_run_asks_about_cells_and_labels_every_image(tiny: Tiny) -> None:
    run = run_local(tiny(CELLS, *LOSSES, *QUIET))
    events = run.events(AnswersReleased)
    assert [(e.answered, e.cells) for e in events] == [(48, 6), (48, 6)]
    together = math.sqrt(sum(e.mu**2 for e in events))
    assert epsilon_of(together, 1e-5) == pytest.approx(50.0, rel=1e-6)
    assert "12 cells of alike images asked about, 96 answers" in statement(run)["how"]


def test_more_cells_than_images_are_refused(tiny: Tiny) -> None:
    with pytest.raises(ConfigError, match=r"release\.cells: 49 cells of 48 transfer images"):
        ExperimentContext(tiny(CELLS.replace("cells: 6", "cells: 49"), *LOSSES, *QUIET))
