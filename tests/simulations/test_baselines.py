"""The baselines: they learn, repeat themselves, count their bytes and follow their papers."""

import json
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedkd.build import local_training
from fedkd.config import ConfigError, make_experiment
from fedkd.data.images import ImageSet
from fedkd.knowledge.kinds import Logits
from fedkd.losses.base import TeacherWeights
from fedkd.models.network import Network, parameter_count
from fedkd.randomness import stream
from fedkd.rounds import ExperimentContext
from fedkd.simulations.baselines import BASELINES, fedkd_wu
from fedkd.simulations.baselines.base import Outcome, RoundResult
from fedkd.simulations.baselines.cfd import coded, decoded
from fedkd.simulations.baselines.dsfl import sharpened
from fedkd.simulations.baselines.fd import class_means, of_the_others, pull_towards
from fedkd.simulations.baselines.fedavg import held
from fedkd.simulations.baselines.fedgh import put_header
from fedkd.simulations.baselines.fedkd_wu import (
    adaptive_loss,
    learn_mutually,
    least_rank,
    packed,
    unpacked,
)
from fedkd.simulations.baselines.fedmd import _Distance
from fedkd.simulations.baselines.fedproto import mean_prototypes, prototype_distance
from fedkd.simulations.baselines.fedtgp import adaptive_margin, tgp_loss
from fedkd.simulations.baselines.fml import mutual_loss
from fedkd.simulations.baselines.local_only import trained_alone
from fedkd.simulations.baselines.loop import (
    distill_client,
    fresh_student,
    fresh_teachers,
    model,
    train,
)
from fedkd.simulations.baselines.pate_vote import winners
from fedkd.simulations.baselines.traffic import MessageMeter, load, read, weights
from fedkd.training.evaluation import evaluate, predict
from fedkd.training.supervised import fit

CLIENTS, TRANSFER, CLASSES = 3, 400, 10
ONE_ROUND = ("one_shot", "one_shot_ensemble", "pate_vote")
OF_ONE_WIDTH = ("fedproto", "fedtgp", "fedgh")
LOW_RANK = ("fedavg_lora", "ffa_lora", "fedex_lora")
BY_WEIGHTS = ("fedavg", "fedprox", "feddf")
SILENT = ("local_only", "centralised")

DIGITS: dict[str, Any] = {
    "name": "digits",
    "rounds": 2,
    "clients": CLIENTS,
    "data": {
        "dataset": "digits",
        "partition": {"name": "dirichlet", "alpha": 1.0, "min_size": 10},
        "private": 300,
        "transfer": {"size": TRANSFER},
        "test": 200,
    },
    "teachers": {
        "models": ["mlp"],
        "epochs": 3,
        "batch_size": 16,
        "optimizer": {"name": "adamw", "lr": 0.005},
    },
    "student": {"model": "mlp"},
    "distillation": {"epochs": 3, "batch_size": 32, "optimizer": {"name": "adamw", "lr": 0.005}},
}


@lru_cache
def context(*overrides: str) -> ExperimentContext:
    return ExperimentContext(make_experiment(DIGITS, overrides))


_FOLDER = tempfile.TemporaryDirectory()


@lru_cache
def begun() -> tuple[str, ...]:
    """The student begins with a file, as what is to be frozen must."""
    file, network = Path(_FOLDER.name) / "mlp.pt", fresh_student(context())
    fit(network, context().data.pooled(), epochs=2, batch_size=16, seed=3)
    torch.save(network.state_dict(), file)
    entry = f"{{name: mlp, weights: {file}}}"
    return f"student.model={entry}", f"teachers.models=[{entry}]"


def run(name: str, *overrides: str, **options: Any) -> Outcome:
    if name in LOW_RANK:
        overrides, options = (*begun(), *overrides), {"targets": "linear", **options}
    received: list[RoundResult] = []
    outcome = BASELINES.create(name, **options).run(context(*overrides), received.append)
    assert tuple(received) == outcome.rounds
    return outcome


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Outcome]:
    """Every baseline, run once."""
    return {name: run(name) for name in BASELINES.names()}


def last(outcome: Outcome) -> float:
    return outcome.rounds[-1].accuracy


def facts(outcome: Outcome) -> list[Any]:
    """All but the seconds."""
    rounds = [(r.round, r.accuracy, r.per_class, r.ece, r.up, r.down) for r in outcome.rounds]
    return [rounds, outcome.holdouts, outcome.uses_transfer]


def same(one: Network, other: Network) -> bool:
    states = one.state_dict(), other.state_dict()
    return all(torch.equal(states[0][key], states[1][key]) for key in states[1])


# -- all of them ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", BASELINES.names())
def test_it_learns_and_reports_every_round(name: str, outcomes: dict[str, Outcome]) -> None:
    outcome = outcomes[name]
    assert [r.round for r in outcome.rounds] == ([1] if name in ONE_ROUND else [1, 2])
    assert last(outcome) > 0.3  # chance is 0.1
    assert len(outcome.holdouts) == CLIENTS
    assert all(share is not None and 0 <= share <= 1 for share in outcome.holdouts)
    for result in outcome.rounds:
        assert len(result.per_class) == CLASSES
        assert 0 <= result.ece <= 1
        assert result.seconds > 0
        assert (result.up > 0) == (result.down > 0) == (name not in SILENT)
    if BASELINES.create(name).has_student:
        labels = context().data.test.labels
        assert float((outcome.predictions.argmax(1) == labels).double().mean()) == last(outcome)
    else:
        assert outcome.predictions is None


@pytest.mark.parametrize("name", sorted(set(BASELINES.names()) - {*SILENT}))
def test_every_method_asks_the_same_clients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that fedkd asks; one-shot methods all that were ever asked. No other one trains."""
    part = ("rounds=3", "teachers.epochs=1", "distillation.epochs=1", "clients=5")
    part = (*part, "federation.participation=0.4")
    cohorts = [set(context(*part).cohort(number).asked) for number in (1, 2, 3)]
    assert len(set(map(frozenset, cohorts))) > 1  # some were away, and come back
    asked: dict[int, set[int]] = {}
    ask = MessageMeter.ask

    def watched(meter: MessageMeter, client: int, *args: Any, **more: float) -> Any:
        asked.setdefault(meter.round, set()).add(client)
        return ask(meter, client, *args, **more)

    monkeypatch.setattr(MessageMeter, "ask", watched)
    outcome = run(name, *part)
    everybody = set().union(*cohorts)
    assert list(asked.values()) == ([everybody] if name in ONE_ROUND else cohorts)
    assert {n for n, share in enumerate(outcome.holdouts) if share is not None} == cohorts[-1]


@pytest.mark.parametrize("name", BASELINES.names())
def test_the_same_seed_gives_the_same_result(name: str, outcomes: dict[str, Outcome]) -> None:
    torch.manual_seed(12345)  # global generators are nobody's business
    assert facts(run(name)) == facts(outcomes[name])


def test_another_seed_gives_another_result(outcomes: dict[str, Outcome]) -> None:
    assert facts(run("fedavg", "seed=1")) != facts(outcomes["fedavg"])


@pytest.mark.parametrize(
    "name", sorted({*BASELINES.names()} - {*BY_WEIGHTS, *LOW_RANK, *OF_ONE_WIDTH})
)
def test_clients_may_have_networks_of_their_own(name: str) -> None:
    mixed = ("teachers.models=[mlp,cnn_tiny]", "rounds=1", "teachers.epochs=1")
    assert len(run(name, *mixed, "distillation.epochs=1").rounds) == 1


@pytest.mark.parametrize("name", BY_WEIGHTS)
def test_averaging_refuses_other_networks_than_the_students(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name}.*'mlp'.*not cnn_tiny; set teachers.models"):
        run(name, "teachers.models=[mlp,cnn_tiny]")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("fedavg", {"epochs": 0}),
        ("fedprox", {"mu": -1.0}),
        ("fedmd", {"digest_epochs": 0}),
        ("fd", {"gamma": -0.1}),
        ("fedproto", {"weight": -0.1}),
        ("fml", {"weight": -0.1}),
        ("fedtgp", {"threshold": -0.1}),
        ("fedtgp", {"server_epochs": 0}),
        ("fedgh", {"lr": 0.0}),
        ("fedkd_wu", {"energy_start": 0.99}),
        ("dsfl", {"temperature": 0.0}),
        ("pate_vote", {"sigma": -1.0}),
    ],
)
def test_impossible_options_are_named(name: str, options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"baseline {name!r}: {next(iter(options))} must"):
        BASELINES.create(name, **options)


def test_clients_on_other_machines_cannot_be_trained_here() -> None:
    space = ExperimentContext(make_experiment(DIGITS))
    data = space.experiment.data.model_copy(update={"public": "public.npz"})
    space.experiment = space.experiment.model_copy(update={"data": data})
    with pytest.raises(ConfigError, match=r"data\.public: a baseline trains all clients"):
        BASELINES.create("local_only").run(space, lambda _: None)


def test_mean_accuracy_of_clients_who_are_alone(outcomes: dict[str, Outcome]) -> None:
    space = context()
    networks = list(trained_alone(space).values())
    shares = [evaluate(network, space.data.test) for network in networks]
    assert last(outcomes["local_only"]) == sum(shares) / CLIENTS
    own = [evaluate(n, space.data.holdout(c)) for c, n in enumerate(networks)]
    assert list(outcomes["local_only"].holdouts) == own


def test_the_ceiling_sees_all_private_images(outcomes: dict[str, Outcome]) -> None:
    assert last(outcomes["centralised"]) == max(map(last, outcomes.values()))
    assert not outcomes["centralised"].uses_transfer


def test_the_transfer_set_is_counted_where_clients_need_it(outcomes: dict[str, Outcome]) -> None:
    needed = {name for name, outcome in outcomes.items() if outcome.uses_transfer}
    assert needed == {"fedmd", "dsfl", "cfd", "one_shot", "pate_vote"}


def test_what_is_read_is_what_was_sent() -> None:
    meter = MessageMeter(3)
    request = meter.ask(0, {"a": np.arange(6, dtype=np.float32).reshape(2, 3)})
    assert read(request)["a"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert read(meter.ask(1)) == {}
    reply = meter.answer(request, {"b": np.ones(4, np.uint8)}, num_examples=7)
    assert read(reply)["b"].dtype == np.uint8
    assert 0 < meter.up < meter.down


def test_weights_travel_with_the_buffers_of_batch_norm() -> None:
    space = context("student.model={name: cnn_tiny, norm: batch}")
    sent, received = fresh_student(space), fresh_student(space)
    fit(sent, space.data.shard(0), **local_training(space.experiment.teachers), seed=0)
    load(received, read(MessageMeter(1).ask(0, weights(sent))))
    assert same(received, sent)


# -- averaging -----------------------------------------------------------------------------


def test_fedavg_of_one_client_is_local_training() -> None:
    alone = ("clients=1", "rounds=1", "data.partition=iid")
    space = context(*alone)
    network = fresh_student(space)
    train(space, {0: network}, 1)
    predictions = run("fedavg", *alone).predictions
    assert torch.equal(predictions, predict(network, space.data.test.images))


@pytest.mark.parametrize("name", ["feddf", "dsfl", "local_only"])
def test_clients_in_one_batch_are_clients_one_by_one(name: str) -> None:
    # Adam divides by roots of what is rounding at first.
    options = ("rounds=1", "teachers.optimizer={name: sgd}")
    alone = run(name, *options)
    together = run(name, *options, "resources.batch_clients=on")
    for one, other in zip(alone.rounds, together.rounds, strict=True):
        assert one.accuracy == pytest.approx(other.accuracy, abs=0.015)
        assert (one.up, one.down) == (other.up, other.down)
    if name != "local_only":
        gaps = (alone.predictions - together.predictions).abs()
        assert float(gaps.max()) < 1e-2 * float(alone.predictions.abs().max())


def test_fedavg_weighs_clients_by_their_examples() -> None:
    space = context("rounds=1")
    states, sizes = [], []
    for client in range(CLIENTS):
        network = fresh_student(space)
        train(space, {client: network}, 1)
        states.append(weights(network))
        sizes.append(len(space.data.shard(client)))
    mean = {
        key: sum(n * state[key] for n, state in zip(sizes, states, strict=True)) / sum(sizes)
        for key in states[0]
    }
    load(network, {key: np.asarray(value, np.float32) for key, value in mean.items()})
    predictions = run("fedavg", "rounds=1").predictions
    assert torch.allclose(predictions, predict(network, space.data.test.images), atol=1e-4)


def test_fedavg_takes_other_local_epochs() -> None:
    short = run("fedavg", "rounds=1", "teachers.epochs=1")
    assert facts(run("fedavg", "rounds=1", epochs=1)) == facts(short)


def test_fedprox_without_its_term_is_fedavg(outcomes: dict[str, Outcome]) -> None:
    assert facts(run("fedprox", mu=0.0)) == facts(outcomes["fedavg"])
    assert facts(outcomes["fedprox"])[0] != facts(outcomes["fedavg"])[0]


def test_the_proximal_gradient_is_that_of_its_loss() -> None:
    space = context()
    network, twin = fresh_student(space), fresh_student(space)
    shard = space.data.shard(0)
    start = [p.detach().clone() for p in twin.parameters()]
    mu, images, labels = 0.5, shard.images[:8], shard.labels
    with held(network, mu):
        for each in (network, twin):
            with torch.no_grad():
                for p in each.parameters():
                    p.add_(0.25)
        torch.nn.functional.cross_entropy(network(images), labels[:8]).backward()
    loss = torch.nn.functional.cross_entropy(twin(images), labels[:8])
    pull = sum(((p - s) ** 2).sum() for p, s in zip(twin.parameters(), start, strict=True))
    (loss + mu / 2 * pull).backward()
    for one, other in zip(network.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(one.grad, other.grad, atol=1e-6)


def test_a_strong_proximal_term_keeps_clients_near_the_server() -> None:
    space = context("teachers.optimizer={name: sgd, lr: 0.01, weight_decay: 0.0}")
    moved = []
    for mu in (0.0, 10.0):
        network = fresh_student(space)
        before = torch.cat([p.detach().flatten().clone() for p in network.parameters()])
        with held(network, mu):
            train(space, {0: network}, 1)
        after = torch.cat([p.detach().flatten() for p in network.parameters()])
        moved.append(float((after - before).norm()))
    assert moved[1] < moved[0] / 2
    hooks = [p._backward_hooks for p in network.parameters()]
    assert not any(hooks)


@pytest.mark.parametrize("name", BY_WEIGHTS)
def test_weights_cost_their_bytes_both_ways(name: str, outcomes: dict[str, Outcome]) -> None:
    size = CLIENTS * 4 * parameter_count(fresh_student(context()))
    for result in outcomes[name].rounds:
        assert size < result.up < size + CLIENTS * 5000
        assert size < result.down < size + CLIENTS * 5000


# -- predictions ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dsfl", "fedmd"])
def test_soft_labels_cost_four_bytes_a_number(name: str, outcomes: dict[str, Outcome]) -> None:
    size = CLIENTS * TRANSFER * CLASSES * 4
    first, second = outcomes[name].rounds
    # A message with one array costs less than 1 kB beside it.
    assert size < first.up == second.up < size + CLIENTS * 1000
    assert size < second.down < size + CLIENTS * 1000
    assert first.down < CLIENTS * 500  # nothing is known yet


def test_cfd_sends_less_than_a_tenth_of_dsfl(outcomes: dict[str, Outcome]) -> None:
    for ours, theirs in zip(outcomes["cfd"].rounds, outcomes["dsfl"].rounds, strict=True):
        assert ours.up < theirs.up / 10
    assert outcomes["cfd"].rounds[1].down < outcomes["dsfl"].rounds[1].down / 10


@pytest.mark.parametrize("classes", [10, 300])
def test_changes_of_labels_come_back_from_their_code(classes: int) -> None:
    generator = np.random.default_rng(0)
    before = generator.integers(0, classes, 500)
    now = before.copy()
    now[::50] = generator.integers(0, classes, 10)
    code = coded(now, before, classes)
    assert (decoded(code, before, classes) == now).all()
    assert code.dtype == np.uint8
    assert len(code) < 100  # ten of five hundred have changed
    assert len(coded(now, np.zeros(500, np.int64), classes)) > 200


def test_era_sharpens_the_mean_of_probabilities() -> None:
    mean = torch.tensor([[0.5, 0.3, 0.2]])
    # softmax([5, 3, 2])
    expected = torch.tensor([[0.843795, 0.114195, 0.042010]])
    assert torch.allclose(sharpened(mean, 0.1), expected, atol=1e-6)
    assert torch.allclose(sharpened(mean, 1e6), torch.full((1, 3), 1 / 3), atol=1e-5)


def test_simple_averaging_is_not_era(outcomes: dict[str, Outcome]) -> None:
    simple = run("dsfl", "rounds=1", aggregation="sa").rounds[0]
    assert simple.accuracy > 0.3
    assert simple.ece != outcomes["dsfl"].rounds[0].ece


def test_fedmds_digest_brings_a_client_nearer_to_the_consensus() -> None:
    space = context()
    network = fresh_teachers(space)[0]
    images = space.data.transfer.images.images
    consensus = 3 * torch.randn(TRANSFER, 1, generator=stream(0, "test")) * torch.ones(CLASSES)
    before = predict(network, images)
    distill_client(space, network, 0, 1, consensus, epochs=1, loss=_Distance())
    after = predict(network, images)
    assert float((after - consensus).abs().mean()) < float((before - consensus).abs().mean())


def test_the_distance_of_fedmd_is_the_mean_over_classes() -> None:
    student, teacher = torch.tensor([[1.0, -2.0], [0.0, 4.0]]), torch.tensor([[0.0, 1.0], [0, 4]])
    trust = TeacherWeights(torch.ones(2))
    loss = _Distance()({Logits(): student}, {Logits(): teacher}, None, trust)
    assert loss.tolist() == [2.0, 0.0]


# -- one shot ------------------------------------------------------------------------------


def test_the_ensemble_is_the_mean_of_the_clients_logits(outcomes: dict[str, Outcome]) -> None:
    space = context()
    logits = [model(network)(space.data.test.images) for network in trained_alone(space).values()]
    predictions = outcomes["one_shot_ensemble"].predictions
    assert torch.equal(predictions, torch.stack(logits).mean(dim=0))


def test_votes_cost_a_byte_each_and_the_ensemble_its_weights(outcomes: dict[str, Outcome]) -> None:
    size = CLIENTS * 4 * parameter_count(fresh_student(context()))
    assert size < outcomes["one_shot_ensemble"].rounds[0].up < size + CLIENTS * 5000
    votes = CLIENTS * TRANSFER
    assert votes < outcomes["pate_vote"].rounds[0].up < votes + CLIENTS * 1000


def test_the_majority_wins() -> None:
    votes = torch.tensor([[0, 1, 2, 3], [0, 1, 1, 0], [2, 1, 1, 2]])
    assert winners(votes, 4, 0.0, stream(0, "vote")).tolist() == [0, 1, 1, 0]
    alone = votes[:1]
    assert winners(alone, 4, 0.0, stream(0, "vote")).tolist() == alone[0].tolist()


def test_noise_on_the_votes_changes_winners_and_comes_from_the_seed() -> None:
    votes = torch.randint(10, (5, 300), generator=stream(0, "test"))
    clear = winners(votes, 10, 0.0, stream(0, "vote"))
    noisy = winners(votes, 10, 3.0, stream(0, "vote"))
    assert float((clear == noisy).double().mean()) < 0.5
    assert torch.equal(noisy, winners(votes, 10, 3.0, stream(0, "vote")))
    assert not torch.equal(noisy, winners(votes, 10, 3.0, stream(1, "vote")))


def test_one_shot_spends_all_rounds_at_once() -> None:
    space = context("clients=1", "data.partition=iid", "rounds=2")
    network = fresh_teachers(space)[0]
    train(space, {0: network}, 1)
    train(space, {0: network}, 2)
    assert same(trained_alone(space)[0], network)


# -- mean logits per class -----------------------------------------------------------------


class _Constant(torch.nn.Module):
    """Logits (mean pixel, 1, 0) for every image."""

    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Linear(1, 3)

    def forward(self, images: Tensor) -> Tensor:
        mean = images.mean(dim=(1, 2, 3))
        return torch.stack([mean, torch.ones_like(mean), torch.zeros_like(mean)], dim=1)


def test_means_are_taken_per_label() -> None:
    network = Network(_Constant(), mean=[0.0], std=[1.0])
    pixels = torch.tensor([0, 51, 255, 102], dtype=torch.uint8)[:, None, None, None]
    shard = ImageSet(pixels.expand(4, 1, 2, 2), torch.tensor([0, 0, 2, 0]), ("a", "b", "c"))
    means, known = class_means(network, shard)
    assert torch.allclose(means, torch.tensor([[0.2, 1, 0], [0, 0, 0], [1, 1, 0]]), atol=1e-6)
    assert known.tolist() == [True, False, True]


def test_a_client_hears_the_mean_of_the_others_that_have_the_class() -> None:
    all_means = torch.tensor([1.0, 3.0, 5.0])[:, None, None].expand(3, 2, 2)
    known = torch.tensor([[True, True], [True, False], [True, False]])
    means, there = of_the_others(all_means, known, 0)
    assert means.tolist() == [[4, 4], [0, 0]]
    assert there.tolist() == [True, False]
    means, there = of_the_others(all_means, known, 1)
    assert means.tolist() == [[3, 3], [1, 1]]
    assert there.tolist() == [True, True]


def test_without_its_term_fd_trains_as_everybody_does() -> None:
    means, known = torch.randn(CLASSES, CLASSES), torch.ones(CLASSES, dtype=torch.bool)
    assert pull_towards(means, known, 0.0) is None
    assert pull_towards(means, ~known, 1.0) is None  # nobody else has the classes


def test_the_term_of_fd_pulls_towards_the_means() -> None:
    space = context()
    network = fresh_teachers(space)[0]
    shard = space.data.shard(0)
    wrong = 10 * torch.eye(CLASSES).roll(1, dims=1)  # of label y, class y + 1
    known = torch.ones(CLASSES, dtype=torch.bool)
    options = local_training(space.experiment.teachers, epochs=20)
    fit(network, shard, **options, seed=0, pull=pull_towards(wrong, known, 10.0))
    winners = predict(network, shard.images).argmax(dim=1)
    assert float((winners == (shard.labels + 1) % CLASSES).double().mean()) > 0.8


def test_fd_sends_a_matrix_and_never_predictions(outcomes: dict[str, Outcome]) -> None:
    size = CLIENTS * CLASSES * (CLASSES * 4 + 1)
    for result in outcomes["fd"].rounds:
        assert size < result.up < size + CLIENTS * 1500


# -- features, and pairs of networks -------------------------------------------------------


def test_prototypes_are_means_of_those_who_have_a_class_and_pull_no_one_else() -> None:
    first = {"means": torch.tensor([[1.0, 3.0], [0.0, 0.0]]), "known": torch.tensor([True, False])}
    second = {"means": torch.tensor([[3.0, 5.0], [0.0, 0.0]]), "known": torch.tensor([True, False])}
    shared = mean_prototypes([first, second])
    assert shared["means"][0].tolist() == [2.0, 4.0]
    assert shared["known"].tolist() == [True, False]
    features = torch.tensor([[2.0, 2.0], [9.0, 9.0]], requires_grad=True)
    distance = prototype_distance(features, **shared, labels=torch.tensor([0, 1]))
    assert float(distance.detach()) == 1.0  # (0 + 4 + 0 + 0) / 4
    (gradient,) = torch.autograd.grad(distance, features)
    assert gradient.tolist() == [[0.0, -1.0], [0.0, 0.0]]


def test_prototypes_want_features_of_one_width() -> None:
    with pytest.raises(ConfigError, match=r"those of client 0 are \d+ wide and those of client 1"):
        run("fedproto", "teachers.models=[mlp,cnn_tiny]")


def test_without_its_term_fedproto_is_everybody_alone() -> None:
    alone, proto = run("local_only"), run("fedproto", weight=0.0)
    assert [r.accuracy for r in proto.rounds] == [r.accuracy for r in alone.rounds]


def test_trained_prototypes_are_those_of_the_published_code() -> None:
    case = json.loads((Path(__file__).parents[1] / "golden" / "prototypes.json").read_text())
    given = {name: torch.tensor(value).double() for name, value in case["inputs"].items()}
    centres = given["tgp_centres"].requires_grad_()
    loss = tgp_loss(given["tgp_proto"], centres, given["tgp_y"].long(), case["margin"])
    assert float(loss.detach()) == pytest.approx(case["value"], rel=1e-7)
    (gradient,) = torch.autograd.grad(loss, centres)
    assert torch.allclose(gradient, torch.tensor(case["grad"]).double(), atol=1e-8)
    means = torch.tensor([[0.0, 0.0], [3.0, 4.0], [3.0, 5.0]])
    assert adaptive_margin(means, 100.0) == pytest.approx(5.0)
    assert adaptive_margin(means, 2.0) == 2.0


def test_mutual_learning_holds_each_to_the_other_and_neither_through_the_other() -> None:
    one = torch.tensor([[2.0, 0.0]], requires_grad=True)
    other = torch.tensor([[0.0, 1.0]], requires_grad=True)
    labels = torch.tensor([0])
    loss = mutual_loss(one, other, labels, weight=0.5)
    p, q = one.softmax(1), other.softmax(1)
    expected = -p[0, 0].log() + 0.5 * (q * (q.log() - p.log())).sum()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()))
    loss.backward()
    assert other.grad is None


def test_the_header_of_fedgh_replaces_the_clients() -> None:
    network = fresh_teachers(context())[0]
    wide = network.head.in_features
    header = {"weight": torch.arange(CLASSES * wide).float().view(CLASSES, wide)}
    put_header(network, {**header, "bias": torch.ones(CLASSES)})
    assert torch.equal(network.head.weight, header["weight"])
    assert network.head.bias.tolist() == [1.0] * CLASSES


def test_fedgh_sends_features_up_and_one_layer_down(outcomes: dict[str, Outcome]) -> None:
    wide = fresh_teachers(context())[0].head.in_features
    second = outcomes["fedgh"].rounds[1]
    assert 0 < second.up - CLIENTS * CLASSES * (4 * wide + 1) < CLIENTS * 1500
    assert 0 < second.down - CLIENTS * CLASSES * 4 * (wide + 1) < CLIENTS * 1500


def test_the_published_fedkd_teaches_more_the_surer_both_are() -> None:
    mentor = torch.tensor([[2.0, 0.0]], requires_grad=True)
    mentee = torch.tensor([[0.0, 1.0]], requires_grad=True)
    labels, distance = torch.tensor([0]), torch.tensor(0.3)
    p, q = mentor.softmax(1), mentee.softmax(1)
    task = -p[0, 0].log() - q[0, 0].log()
    both = (q * (q.log() - p.log())).sum() + (p * (p.log() - q.log())).sum()
    loss = adaptive_loss(mentor, mentee, labels, distance)
    assert float(loss.detach()) == pytest.approx(float((task + (both + 0.3) / task).detach()))
    # The mentor's own: its cross entropy, and KL(mentee || mentor) over the two tasks' sum.
    (gradient,) = torch.autograd.grad(loss, mentor)
    own = p - torch.tensor([[1.0, 0.0]]) + (p - q) / task
    assert torch.allclose(gradient, own.detach(), atol=1e-6)


def test_updates_travel_in_the_least_rank_that_has_their_energy() -> None:
    sigma = torch.tensor([3.0, 2.0, 1.0, 0.0])  # squares: 9, 4, 1
    assert [least_rank(sigma, share) for share in (0.5, 0.65, 0.93, 1.0)] == [1, 2, 3, 3]
    assert least_rank(torch.zeros(3), 0.9) == 0
    thin = np.outer(np.arange(8), np.arange(12)).astype(np.float32)
    kernel = thin.reshape(8, 3, 2, 2)
    state = {"kernel": kernel, "still": np.zeros((5, 5), np.float32), "bias": np.ones(3, "f4")}
    sent = packed(state, 0.95)
    assert {name: array.size for name, array in sent.items()} == {
        "kernel/u": 8,
        "kernel/v": 12,
        "still/u": 0,
        "still/v": 0,
        "bias": 3,
    }
    whole = unpacked(sent, state)
    for name, array in state.items():
        assert np.allclose(whole[name], array, atol=1e-4)
    full = np.eye(4, dtype=np.float32)
    assert packed({"full": full}, 0.95)["full"] is full


def test_the_published_fedkd_sends_less_than_its_weights(outcomes: dict[str, Outcome]) -> None:
    first, second = outcomes["fedkd_wu"].rounds
    whole = outcomes["fml"].rounds[0]
    assert first.down == whole.down  # the mentee as it begins
    assert max(first.up, second.up, second.down) < whole.up
    all_of_it = run("fedkd_wu", energy_start=1.0, energy_end=1.0).rounds
    assert all_of_it[1].up > second.up


def test_every_mentee_begins_where_the_server_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the update of the last round, or by all weights after rounds away."""
    begun: list[bytes] = []

    def watched(_mentor: Network, mentee: Network, *args: Any, **more: Any) -> None:
        begun.append(b"".join(value.tobytes() for value in weights(mentee).values()))
        learn_mutually(_mentor, mentee, *args, **more)

    monkeypatch.setattr(fedkd_wu, "learn_mutually", watched)
    run("fedkd_wu", "rounds=3", "teachers.epochs=1", "federation.participation=0.67")
    assert len(begun) == 6
    assert [len(set(begun[n : n + 2])) for n in (0, 2, 4)] == [1, 1, 1]
    assert len(set(begun)) == 3
