"""The training on noisy labels: phases, state, guards, and what it never reads."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from fedkd.data.datasets import load_dataset
from fedkd.data.images import ImageSet
from fedkd.models.build import build_model
from fedkd.models.network import Network
from fedkd.runs.directory import network_hash
from fedkd.training.loop import Phase
from fedkd.training.noisy.loop import Noted, _Loop, auc, fit_noisy
from fedkd.training.noisy.options import Noisy, Unlearn
from fedkd.training.noisy.pair import (
    agreement_shares,
    check_unlearning,
    halves,
    paired,
    with_new_head,
)
from fedkd.training.noisy.pretraining import contrast_loss, pretrain
from fedkd.training.noisy.references import (
    References,
    embedded,
    few_neighbours,
    neighbour_labels,
)
from fedkd.training.optimizers import Optimizer

OPTIONS = Noisy(
    warmup=2, encoder_from=4, unlearn=Unlearn(start=3, period=3, length=2), neighbours=5
)
SGD = Optimizer("sgd", lr=0.02)


def images(count: int = 48, wrong: float = 0.4) -> ImageSet:
    """Some images of three classes, with wrong labels among them."""
    train, _ = load_dataset("synthetic", None, classes=3, size=8, per_class=60)
    some = train.subset(torch.randperm(len(train), generator=torch.Generator().manual_seed(0)))
    some = some.subset(torch.arange(count))
    labels = some.labels.clone()
    labels[: round(wrong * count)] = (labels[: round(wrong * count)] + 1) % 3
    return replace(some, labels=labels, true_labels=some.labels)


def network(name: str, seed: int, **options: Any) -> Network:
    mean, std = images().statistics()
    return build_model(
        name, num_classes=3, in_channels=images().shape[0], image_size=8, mean=mean, std=std,
        seed=seed, options=options,
    )  # fmt: skip


def pair() -> tuple[Network, Network]:
    second = with_new_head(network("mlp", 1, hidden=8), 1, "mlp")
    return network("cnn_tiny", 0, norm="batch", width=4), second


def trained(shard: ImageSet, options: Noisy = OPTIONS, **more: Any) -> tuple[Any, list[str]]:
    first, second = pair()
    partner = None if options.alone else second
    given = {"epochs": 9, "batch_size": 16, "optimizer": SGD, "augment": "crop", "seed": 3}
    result = fit_noisy(first, partner, shard, options, **{**given, **more})
    return result, [network_hash(each) for each in (first, partner) if each is not None]


def test_true_labels_are_measured_by_and_never_read() -> None:
    shard = images()
    truth = Noted(truth=shard.true_labels)
    absurd = Noted(truth=torch.zeros_like(shard.true_labels))
    result, hashes = trained(shard, noted=truth)
    other, same = trained(replace(shard, true_labels=None), noted=absurd)
    assert hashes == same == trained(shard)[1]
    assert "purity_a" in result.state["curves"][-1]
    assert result.state["curves"] != other.state["curves"]


@pytest.mark.parametrize("knows", [False, True])
@pytest.mark.parametrize("after", [1, 3, 7])
def test_a_training_that_goes_on_is_the_one_that_was_not_interrupted(
    after: int, knows: bool
) -> None:
    """Also in the middle of unlearning (epochs 7 and 8), and before the encoder learns."""
    kept: dict[int, Any] = {}
    whole = trained(images(), knows=knows, on_epoch=lambda r, s: kept.update({r["epoch"]: s()}))
    again = trained(images(), knows=knows, state=kept[after], done=after)
    assert again[1] == whole[1]
    assert again[0].state["curves"] == whole[0].state["curves"]
    assert kept[7]["copies"]
    assert not kept[9]["copies"]


def test_rounds_go_on_from_each_other_and_each_has_its_own_schedule() -> None:
    shard, state, phases = images(), None, []
    for number in range(3):
        result, _ = trained(shard, epochs=3, whole=9, state=state, seed=number)
        state = result.state
    phases = [record["phase"] for record in state["curves"]]
    assert phases == ["warm-up"] * 2 + ["learning"] * 4 + ["unlearning"] * 2 + ["learning"]
    assert state["epoch"] == 9


def test_a_pretrained_encoder_stays_as_it_is_until_its_time() -> None:
    seen: list[dict[str, Any]] = []
    trained(images(), knows=True, on_epoch=lambda _, s: seen.append(s()["networks"]["v"]))
    _, second = pair()
    body = {name for name in second.state_dict() if "head" not in name}
    for number, weights in enumerate(seen):
        same = all(torch.equal(weights[name], second.state_dict()[name]) for name in body)
        assert same == (number < OPTIONS.encoder_from)
        assert not torch.equal(weights["body.head.0.weight"], second.body.head[0].weight)


def test_what_is_unlearnt_is_in_neither_set() -> None:
    shard = images(60)
    result, _ = trained(shard, noted=Noted(truth=shard.true_labels))
    unlearnt = result.state["unlearnt"]
    out = int((unlearnt["a"] | unlearnt["v"]).sum())
    last = result.state["curves"][-1]
    assert last["unlearnt_a"] == int(unlearnt["a"].sum())
    assert 0 < out <= 60 - last["labelled_a"]
    given, reference = shard.labels, result.state["reference"][0]
    assert (given != reference)[unlearnt["a"] | unlearnt["v"]].all()


@pytest.mark.parametrize("method", ["acdu", "divide", "coteach", "gmm"])
@pytest.mark.parametrize("count", [1, 5])
def test_few_images_are_learnt_from(method: str, count: int) -> None:
    result, hashes = trained(images(count, wrong=0.2), replace(OPTIONS, method=method))
    assert len(hashes) == 2 - (method == "gmm")
    assert result.fit.loss == result.fit.loss
    assert len(result.state["curves"]) == 9


def test_where_no_label_is_clean_the_threshold_falls_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    options = replace(OPTIONS, method="coteach", threshold=0.999999, prior=1e-7, neighbours=0)
    result, _ = trained(images(), options)
    lines = [record for record in result.state["curves"] if "threshold_a" in record]
    assert lines
    assert all(record["labelled_a"] >= 2 for record in lines)
    assert sum("the threshold falls" in message for message in caplog.messages) == 1
    assert any("lost_a" in record for record in lines)


def test_a_class_without_a_clean_label_keeps_its_likeliest_ones() -> None:
    """Else its losses would never fall, and it would never come back."""
    shard = images()
    options = replace(OPTIONS, method="gmm", warmup=1)
    loop = _Loop(
        network("cnn_tiny", 0, norm="batch"), None, shard, options, 3, None, False, 16, SGD,
        "none", 0, Noted(), Phase("the teacher"),
    )  # fmt: skip
    clean = torch.where(shard.labels == 2, torch.linspace(0, 0.4, len(shard)), 0.9)
    everybody = torch.ones(len(shard), dtype=torch.bool)
    labelled, trusted, _, lost = loop._labelled(clean, everybody)
    rows = (shard.labels == 2).nonzero()[:, 0]
    kept = rows[labelled[rows]]
    assert lost == [2]
    assert len(kept) == max(1, round(0.1 * len(rows)))
    assert clean[kept].min() >= clean[rows[~labelled[rows]]].max()
    assert (trusted[kept] == 1).all()
    assert labelled[shard.labels != 2].all()


def test_what_neighbours_are_sure_of_moves_the_chance_of_a_label_to_be_right() -> None:
    given = torch.tensor([0, 0, 1, 1])
    found = References.of(torch.tensor([0, 1, 1, 0]), torch.tensor([0.8, 0.8, 0.5, 0.5]), given)
    assert found.confirmed.tolist() == [True, False, False, False]
    assert found.contradicted.tolist() == [False, True, False, False]
    assert found.assent == 0.25
    clean = torch.full((4,), 0.6, dtype=torch.float64)
    assert found.corrected(clean).tolist() == pytest.approx([0.8, 0.2, 0.6, 0.6])
    assert found.corrected(1.5 * clean)[0] == pytest.approx(0.9)
    assert [few_neighbours(15, count) for count in (40, 240, 1438)] == [3, 6, 15]


@pytest.mark.parametrize("method", ["acdu", "gmm"])
def test_a_shard_that_its_neighbours_confirm_is_learnt_plainly(method: Any) -> None:
    """With few images the losses tell rare classes from frequent ones, not wrong labels."""
    shard = images(150, wrong=0)
    rare = (shard.labels != 2) | (torch.arange(150) < 20)
    shard = shard.subset(rare.nonzero()[:, 0])
    options = replace(OPTIONS, method=method, warmup=1)
    for trust, phase in ((0.6, "plain"), (1.0, "learning")):
        more = {"noted": Noted(shard.labels), "epochs": 3}
        result, _ = trained(shard, replace(options, trust=trust), **more)
        last = result.state["curves"][-1]
        assert (last["phase"], last["assent"] > 0.6) == (phase, True)
        assert trust == 1 or last["labelled_a"] == len(shard)


def test_of_a_class_that_has_no_image_no_label_is_kept() -> None:
    """Its labels are all wrong, and the neighbours say so."""
    shard = images()
    loop = _Loop(
        network("cnn_tiny", 0, norm="batch"), None, shard, replace(OPTIONS, method="gmm"), 3, None,
        False, 16, SGD, "none", 0, Noted(), Phase("the teacher"),
    )  # fmt: skip
    other = torch.where(shard.labels == 2, 0, shard.labels)
    loop.references = References.of(other, torch.ones(len(shard)), shard.labels)
    clean = torch.where(shard.labels == 2, 0.1, 0.9)
    labelled, _, _, lost = loop._labelled(clean, torch.ones(len(shard), dtype=torch.bool))
    assert lost == [2]
    assert not labelled[shard.labels == 2].any()


def test_networks_that_equal_their_copy_are_refused() -> None:
    with pytest.raises(ValueError, match="'mlp' has neither batch norm nor dropout"):
        check_unlearning(network("mlp", 0), "mlp")
    with pytest.raises(ValueError, match="neither batch norm"):
        check_unlearning(network("cnn_tiny", 0, norm="group"), "cnn_tiny")
    for each in pair():
        check_unlearning(each, "it")
    headless = Network(nn.Flatten(), mean=[0.5], std=[0.5])
    with pytest.raises(ValueError, match="'flat' has no linear head"):
        with_new_head(headless, 0, "flat")


def test_a_pair_is_one_network_of_two() -> None:
    first, second = (each.eval() for each in pair())
    both = paired(first, second)
    some = images().images[:3]
    torch.testing.assert_close(both(some), first(some) + second(some))
    again = halves(both)
    torch.testing.assert_close(again[1].eval()(some), second(some))


def test_voters_count_by_how_often_they_are_right() -> None:
    assert agreement_shares(0.8, 0.8) == (1.0, 1.0)
    assert agreement_shares(0.5, 0.5) == agreement_shares(0.1, 0.2) == (1.0, 1.0)
    first, second = agreement_shares(0.9, 0.6)
    assert first + second == pytest.approx(2)
    assert first > 4 * second
    assert agreement_shares(1.0, 0.5) == pytest.approx((2.0, 0.0))


def test_neighbours_name_an_image_without_its_own_label() -> None:
    features = torch.tensor([[1.0, 0], [1, 0.1], [1, 0.2], [0, 1], [0.1, 1], [0.2, 1]])
    labels = torch.tensor([1, 0, 0, 1, 1, 2])
    named, share = neighbour_labels(features, labels, 3, neighbours=2)
    assert named.tolist()[:1] == [0]
    assert named.tolist()[5] == 1
    assert share.tolist()[0] == share.tolist()[5] == 1
    # Of as many votes the nearer one's.
    assert neighbour_labels(features, labels, 3, neighbours=2)[0].tolist()[4] in (1, 2)
    alone = neighbour_labels(features[:1], labels[:1], 3)
    assert alone[0].tolist() == [1]
    assert neighbour_labels(features[:2], labels[:2], 3)[0].tolist() == [0, 1]


def test_contrasts_pull_views_of_an_image_together() -> None:
    same = torch.eye(4)
    assert contrast_loss(same, same).mean() < contrast_loss(same, same.flip(0)).mean()
    learner = network("mlp", 0, hidden=8)
    before = {name: tensor.clone() for name, tensor in learner.state_dict().items()}
    pretrain(learner, images().images, epochs=2, optimizer=SGD, seed=0)
    after = learner.state_dict()
    assert torch.equal(after["body.head.weight"], before["body.head.weight"])
    assert not torch.equal(after["body.trunk.1.weight"], before["body.trunk.1.weight"])
    features = embedded(learner, images().images)
    assert features is not None
    assert features.shape == (48, 8)


def test_the_area_under_the_curve_is_the_share_of_pairs_in_order() -> None:
    chances = torch.tensor([0.9, 0.8, 0.8, 0.1])
    right = torch.tensor([True, False, True, False])
    assert auc(chances, right) == pytest.approx((1 + 1 + 0.5 + 1) / 4)
    assert auc(chances, torch.ones(4, dtype=torch.bool)) is None


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (Noisy(), "unlearn.start: nothing is ever unlearnt: .* epoch 60 "),
        (Noisy(warmup=20), "warmup: labels are judged after 20 epochs"),
        (Noisy(unlearn=Unlearn(start=5, period=9)), "set unlearn.start to 19 or more"),
        (Noisy(unlearn=Unlearn(start=10, period=5, length=6), warmup=2), "do not fit"),
    ],
)
def test_phases_that_never_come_are_refused(options: Noisy, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        options.check(20, "20 epochs")
    Noisy(method="divide").check(20, "20 epochs")
