"""Every fusion rule: what all must keep, and what each is for."""

import math

import numpy as np
import pytest
import torch

from fedkd.fusion import FUSIONS
from fedkd.fusion.base import FitContext, Fusion, fit_rules
from fedkd.fusion.consensus import agreement
from fedkd.fusion.median import weighted_median
from fedkd.fusion.trimmed_mean import trimmed
from fedkd.knowledge.kinds import DensityRatio, Logits
from fedkd.knowledge.payload import Bank, Ensemble, Knowledge, Teacher, fuse


def ensemble(samples: int = 7, classes: int = 4, scale: float = 3.0) -> Ensemble:
    generator = torch.Generator().manual_seed(0)
    teachers = tuple(
        Teacher(client, sum(counts), counts)
        for client, counts in enumerate([(50, 0, 0, 1), (0, 40, 3, 0), (5, 5, 5, 5)])
    )
    logits = scale * torch.randn(3, samples, classes, generator=generator)
    ratios = torch.rand(3, samples, generator=generator)
    tensors = {Logits(): logits, DensityRatio(): ratios}
    return Ensemble(teachers, tensors, torch.full((3, samples), 1 / 3))


def reorder(item: Ensemble, order: list[int]) -> Ensemble:
    return Ensemble(
        tuple(item.teachers[i] for i in order),
        {kind: tensor[order] for kind, tensor in item.tensors.items()},
        item.weights[order],
    )


def ready(rule: Fusion, item: Ensemble) -> Fusion:
    """The rule as the server would have it, with true classes of every sample."""
    bank = Bank(item.teachers, {k: list(t.numpy()) for k, t in item.tensors.items()})
    labels = item.logits.sum(0).argmax(-1)
    student = item.logits.mean(0)
    return fit_rules([rule], FitContext(bank, labels=labels, student=student, seed=3))[0]


SMOKE = ("density_ratio", "class_gated")


@pytest.fixture(
    params=[
        pytest.param(n, marks=[pytest.mark.smoke] if n in SMOKE else []) for n in FUSIONS.names()
    ]
)
def rule(request: pytest.FixtureRequest) -> Fusion:
    return FUSIONS.create(request.param)


def test_weights_sum_to_one(rule: Fusion) -> None:
    for scale in (0.0, 3.0, 1e4):
        item = ensemble(scale=scale)
        after = ready(rule, item)(item)
        assert torch.isfinite(after.weights).all()
        assert (after.weights >= 0).all()
        assert torch.allclose(after.weights.sum(0), torch.ones(7), atol=1e-5)
        together = after.mean_probabilities()
        assert torch.allclose(together.sum(1), torch.ones(7), atol=1e-4)
        assert len(after) == len(after.logits) == len(after.weights)


def test_autocast_keeps_out(rule: Fusion) -> None:
    item = ensemble()
    expected = ready(rule, item)(item)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = ready(rule, item)(item)
        assert torch.equal(found.weights, expected.weights)
        assert torch.equal(found.mean_probabilities(), expected.mean_probabilities())


def test_options_are_words_and_numbers_that_mean_something() -> None:
    for name in FUSIONS.names():
        for option, parameter in FUSIONS.options(name).items():
            word, number = (isinstance(parameter.default, kind) for kind in (str, float))
            for wrong in ["foo"] if word else [math.nan, math.inf, "foo"] if number else []:
                with pytest.raises(ValueError, match=f"fusion '{name}': {option} must be"):
                    FUSIONS.get(name)(**{option: wrong})


def test_order_of_teachers_does_not_matter(rule: Fusion) -> None:
    if type(rule).__name__ == "LearnedGate":
        pytest.skip("its network is drawn for an order")
    order = [2, 0, 1]
    one, two = ensemble(), reorder(ensemble(), order)
    assert torch.allclose(
        ready(rule, one)(one).mean_probabilities(),
        ready(rule, two)(two).mean_probabilities(),
        atol=1e-5,
    )


def test_each_sample_stands_alone(rule: Fusion) -> None:
    whole = ensemble()
    part = Ensemble(
        whole.teachers, {k: t[:, 2:4] for k, t in whole.tensors.items()}, whole.weights[:, 2:4]
    )
    fitted = ready(rule, whole)
    assert torch.allclose(
        fitted(whole).mean_probabilities()[2:4], fitted(part).mean_probabilities(), atol=1e-5
    )


def test_silent_teachers_stay_silent(rule: Fusion) -> None:
    """A teacher without weight changes nothing, whatever it answers."""
    some = ensemble()
    weights = torch.tensor([[0.0], [0.5], [0.5]]).expand(3, 7)
    fitted = ready(rule, some)
    loud = {kind: tensor.clone() for kind, tensor in some.tensors.items()}
    loud[Logits()][0] = 50 * torch.eye(4)[torch.arange(7) % 4]
    before = fitted(Ensemble(some.teachers, some.tensors, weights)).mean_probabilities()
    if type(rule).__name__ == "LearnedGate":
        after = fitted(Ensemble(some.teachers, some.tensors, weights))
        assert (after.weights[0] == 0).all()
        return
    after = fitted(Ensemble(some.teachers, loud, weights)).mean_probabilities()
    assert torch.allclose(before, after, atol=1e-5)


# Who colludes and whether anybody is sure are questions of heads; one of little weight is one.
HEADS = ("consensus", "cronus", "history", "knowledge_vote", "learned_gate")


@pytest.mark.parametrize("name", [name for name in FUSIONS.names() if name not in HEADS])
def test_what_has_aged_away_is_as_if_it_had_never_been(name: str) -> None:
    some = {"dawid_skene": {"dependence": 0.0}, "density_ratio": {"limit": 1.0}}
    item = ensemble(samples=40)
    arrays = {kind: list(tensor.numpy()) for kind, tensor in item.tensors.items()}
    decay = np.ones((3, 40), np.float32)
    decay[1] = 1e-9
    old = Bank(item.teachers, arrays, decay=decay)
    without = old.only([0, 2])
    assert without.decay is not None
    labels = torch.arange(40) % 4

    def joint(bank: Bank) -> torch.Tensor:
        rule = FUSIONS.create(name, **some.get(name, {}))
        return fuse(bank, fit_rules([rule], FitContext(bank, labels=labels))).probabilities

    assert torch.allclose(joint(old), joint(without), atol=1e-4)
    decay[1] = 1
    assert not torch.allclose(
        joint(Bank(item.teachers, arrays, decay=decay)), joint(without), atol=1e-2
    )


def test_one_teacher_alone_is_believed(rule: Fusion) -> None:
    item = ensemble()
    alone = Ensemble(
        item.teachers[2:], {k: t[2:] for k, t in item.tensors.items()}, torch.ones(1, 7)
    )
    after = ready(rule, alone)(alone)
    own = torch.softmax(alone.logits[0], -1)
    assert torch.equal(after.mean_probabilities().argmax(1), own.argmax(1))


def test_two_classes_and_saturated_logits_give_numbers(rule: Fusion) -> None:
    tensors = {
        Logits(): 1e4 * torch.tensor([[[1.0, -1.0]], [[-1.0, 1.0]], [[1.0, -1.0]]]).expand(3, 5, 2),
        DensityRatio(): torch.ones(3, 5),
    }
    teachers = tuple(Teacher(m, 10, (5, 5)) for m in range(3))
    item = Ensemble(teachers, tensors, torch.full((3, 5), 1 / 3))
    together = ready(rule, item)(item).mean_probabilities()
    assert torch.isfinite(together).all()
    if type(rule).__name__ != "LearnedGate":
        assert (together.argmax(1) == 0).all()


def teachers_of(bad: str, teachers: int = 10, samples: int = 200, classes: int = 5) -> Bank:
    """Honest teachers are right nine times out of ten; the first three do as `bad` says."""
    generator = torch.Generator().manual_seed(1)
    truth = torch.arange(samples) % classes
    wrong = torch.rand(teachers, samples, generator=generator) < 0.1
    named = torch.where(
        wrong, torch.randint(classes, (teachers, samples), generator=generator), truth
    )
    logits = 4 * torch.nn.functional.one_hot(named, classes).float()
    logits += 0.5 * torch.randn(logits.shape, generator=generator)
    if bad == "collude":  # all name the class after the true one, very surely
        logits[:3] = 30 * torch.nn.functional.one_hot((truth + 1) % classes, classes).float()
    elif bad == "permute":
        logits[:3] = logits[:3].roll(2, dims=-1)
    elif bad == "constant":
        logits[:3] = torch.tensor([50.0, 0, 0, 0, 0])
    return Bank.of([Knowledge(Teacher(m), {Logits(): logits[m]}) for m in range(teachers)])


@pytest.mark.parametrize("bad", ["collude", "permute", "constant"])
@pytest.mark.parametrize(
    "name", ["median", "trimmed_mean", "geometric_median", "cronus", "consensus", "history"]
)
def test_robust_rules_bear_thirty_percent_of_attackers(name: str, bad: str) -> None:
    bank = teachers_of(bad)
    fused = fuse(bank, fit_rules([FUSIONS.create(name)], FitContext(bank)))
    assert float((fused.targets == torch.arange(200) % 5).double().mean()) > 0.97
    # What they would learn from is right, not only its winner.
    sure = fused.probabilities[torch.arange(200), torch.arange(200) % 5].mean()
    plain = fuse(bank, []).probabilities[torch.arange(200), torch.arange(200) % 5].mean()
    assert sure > plain + 0.1


def bank_with_ratios(logits: torch.Tensor, ratios: torch.Tensor, sizes: list[int]) -> Bank:
    return Bank.of(
        [
            Knowledge(Teacher(m, size), {Logits(): logits[m], DensityRatio(): ratios[m]})
            for m, size in enumerate(sizes)
        ]
    )


def specialists(classes: int, samples: int = 400) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (10, samples, 10) and ratios of teachers that know some of ten classes each.

    Other images they call the class that they know and that comes next.
    """
    truth = torch.arange(samples) % 10
    logits, ratios = torch.zeros(10, samples, 10), torch.full((10, samples), 0.2)
    for m in range(10):
        known = torch.tensor([(m + step) % 10 for step in range(classes)])
        following = (known[None, :] - truth[:, None]) % 10
        named = known[following.argmin(dim=1)]
        logits[m] = 5 * torch.nn.functional.one_hot(named, 10).float()
        ratios[m][named == truth] = 1.0
    noise = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    return logits + noise, ratios


@pytest.mark.parametrize("lie", ["same class", "wrong labels", "random", "nobody"])
@pytest.mark.parametrize(
    ("order", "classes"), [("density_ratio consensus", 5), ("consensus density_ratio", 7)]
)
def test_consensus_tells_liars_from_specialists(order: str, classes: int, lie: str) -> None:
    """Honest teachers know different classes, and liars agree with each other and claim a lot."""
    logits, ratios = specialists(classes)
    liars = [] if lie == "nobody" else [1, 4, 8]
    for m in liars:
        if lie == "same class":
            logits[m] = torch.tensor([20.0] + [0.0] * 9)
            ratios[m] = 1.0
        elif lie == "wrong labels":
            logits[m] = logits[m][:, [3, 6, 0, 9, 1, 8, 4, 2, 5, 7]]
        else:
            logits[m] = 20 * torch.randn(400, 10, generator=torch.Generator().manual_seed(m))
    bank = bank_with_ratios(logits, ratios, [10**6 if m in liars else 50 for m in range(10)])
    rules = fit_rules([FUSIONS.create(name) for name in order.split()], FitContext(bank))
    fused = fuse(bank, rules)
    assert fused.bank.weights is not None
    silent = [m for m in range(10) if fused.bank.weights[m].max() == 0]
    assert silent == liars
    assert float((fused.targets == torch.arange(400) % 10).double().mean()) == 1.0


def test_consensus_hears_all_where_nobody_agrees() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(300, 5, generator=generator) for _ in range(4)]
    constant = [torch.eye(5)[m].expand(300, 5) for m in range(4)]
    for answers in (noise, constant):
        bank = Bank.of([Knowledge(Teacher(m), {Logits(): x}) for m, x in enumerate(answers)])
        [rule] = fit_rules([FUSIONS.create("consensus")], FitContext(bank))
        weights = rule(bank.rows(torch.arange(300))).weights
        assert torch.isfinite(weights).all()
        assert torch.allclose(weights.sum(0), torch.ones(300))
    assert (weights == 0.25).all()


def test_agreement_is_the_correlation_over_common_ground() -> None:
    """Against numpy, with weights, in several batches' worth of samples."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 2500, 4, generator=generator)
    logits[1] += logits[0]
    ratios = torch.rand(3, 2500, generator=generator)
    bank = bank_with_ratios(logits, ratios, [10] * 3)
    before = fit_rules([FUSIONS.create("density_ratio")], FitContext(bank))
    found = agreement(FitContext(bank, before=tuple(before)))
    weights = before[0](bank.rows(torch.arange(2500), kinds=bank.fusible)).weights
    probabilities = torch.softmax(logits, -1).numpy()
    for i in range(3):
        for j in range(3):
            both = np.cov(
                np.concatenate([probabilities[i], probabilities[j]], axis=1).T,
                aweights=(weights[i] * weights[j]).numpy(),
            )
            expected = np.trace(both[:4, 4:]) / math.sqrt(
                np.trace(both[:4, :4]) * np.trace(both[4:, 4:])
            )
            assert float(found[i, j]) == pytest.approx(expected, abs=1e-5)


def test_history_remembers_who_attacked_before() -> None:
    """Attackers who behave in the second round are still trusted less than the others."""
    rule = FUSIONS.create("history")
    first = teachers_of("collude")
    [after] = fit_rules([rule], FitContext(first))
    second = teachers_of("none")
    [now] = fit_rules([rule], FitContext(second), [after.state])
    weights = now(second.rows(torch.arange(5))).weights
    assert weights[:3].max() < 0.5 * weights[3:].min()
    late = Bank(tuple(Teacher(t.number + 5) for t in second.teachers), second.arrays)
    [later] = fit_rules([rule], FitContext(late), [after.state])
    assert later(late.rows(torch.arange(5))).weights[-1, 0] > 0


def test_era_and_its_successor_by_hand() -> None:
    logits = torch.tensor([[[0.8, 0.2]], [[0.4, 0.6]]]).log()
    pair = Ensemble((Teacher(0), Teacher(1)), {Logits(): logits}, torch.full((2, 1), 0.5))
    era = FUSIONS.create("era", temperature=0.1)(pair).mean_probabilities()
    assert era[0, 0].item() == pytest.approx(1 / (1 + math.exp(-2)))
    better = FUSIONS.create("enhanced_era", beta=2.0)(pair).mean_probabilities()
    assert better[0, 0].item() == pytest.approx(0.36 / 0.52)
    same = FUSIONS.create("enhanced_era", beta=1.0)(pair).mean_probabilities()
    assert same[0].tolist() == pytest.approx([0.6, 0.4])


def test_weighted_median_and_trimmed_mean_by_hand() -> None:
    values = torch.tensor([1.0, 2.0, 10.0, 4.0])[:, None, None]
    even = torch.full((4, 1), 0.25)
    assert weighted_median(values, even).item() == 3.0
    heavy = torch.tensor([0.1, 0.1, 0.6, 0.2])[:, None]
    assert weighted_median(values, heavy).item() == 10.0
    assert trimmed(values, even, 0.25).item() == pytest.approx(3.0)
    assert trimmed(values, even, 0.0).item() == pytest.approx(4.25)
    assert trimmed(values, even, 0.125).item() == pytest.approx((0.5 + 2 + 4 + 5) / 3)


def test_the_knowledge_vote_hears_the_sure_and_believes_the_majority() -> None:
    sure, unsure = 0.95, 0.5
    first = torch.tensor([sure, sure, sure, unsure])
    named = torch.tensor([0, 1, 1, 0])
    p = torch.full((4, 1, 2), 0.0)
    p[torch.arange(4), 0, named] = first
    p[torch.arange(4), 0, 1 - named] = 1 - first
    item = Ensemble(tuple(map(Teacher, range(4))), {Logits(): p.log()}, torch.full((4, 1), 0.25))
    weights = FUSIONS.create("knowledge_vote", confidence=0.9)(item).weights
    assert weights[:, 0].tolist() == [0.0, 0.5, 0.5, 0.0]


def test_the_consensus_focus_counts_what_a_teacher_adds() -> None:
    """Two images, three teachers with 10, 20 and 30 images; the third is alone, or not sure."""
    p = torch.tensor(
        [[[0.95, 0.05], [0.98, 0.02]], [[0.9, 0.1], [0.2, 0.8]], [[0.05, 0.95], [0.4, 0.6]]]
    )
    who = tuple(Teacher(number, 10 * (number + 1)) for number in range(3))
    bank = Bank(who, {Logits(): list(p.log().numpy())})
    rule = FUSIONS.create("knowledge_vote", confidence=0.85, focus=True)
    assert rule.discloses == ("num_examples",)
    assert FUSIONS.create("knowledge_vote").discloses == ()
    fitted = fit_rules([rule], FitContext(bank))[0]
    # Image 1: 0 and 1 outvote 2. Image 2: only 0 is sure. Without 0 the last two draw in image 1,
    # 2 having more mass behind it, and nobody is sure of image 2.
    everybody = 0.95 + 0.9 + 0.98
    without = torch.tensor([0.95, 0.95 + 0.98, 0.95 + 0.9 + 0.98])
    expected = torch.tensor([10.0, 20.0, 30.0]) * ((everybody - without) / 2).exp()
    torch.testing.assert_close(fitted.weights, expected)
    rows = bank.rows(torch.arange(2))
    weights = fitted(rows).weights
    torch.testing.assert_close(
        weights[:, 0], torch.tensor([*(expected[:2] / expected[:2].sum()), 0])
    )
    assert weights[:, 1].tolist() == [1, 0, 0]
    with pytest.raises(RuntimeError, match="KnowledgeVote has to see the whole transfer set"):
        rule(rows)


def test_coverage_needs_no_counts_to_find_who_never_saw_a_class() -> None:
    """Teacher 0 knows classes 0 and 1, teacher 1 the rest; each is sure of nonsense elsewhere."""
    truth = torch.arange(40) % 4
    own = torch.stack([truth % 2, 2 + truth % 2])
    logits = 6 * torch.nn.functional.one_hot(own, 4).float()
    logits[0, truth >= 2] *= 0.3
    logits[1, truth < 2] *= 0.3
    bank = Bank.of([Knowledge(Teacher(m), {Logits(): logits[m]}) for m in (0, 1)])
    [rule] = fit_rules([FUSIONS.create("coverage")], FitContext(bank))
    after = rule(bank.rows(torch.arange(40)))
    assert after.class_weights is not None
    assert (after.class_weights[0, 2:] == 0).all()
    assert (after.mean_probabilities().argmax(1) == truth).all()


def test_labelled_images_show_who_is_right() -> None:
    bank = teachers_of("collude")
    truth = torch.arange(200) % 5
    known = Bank(bank.teachers, {Logits(): [a[:100] for a in bank.arrays[Logits()]]})
    context = FitContext(bank, validation=known, validation_labels=truth[:100])
    [rule] = fit_rules([FUSIONS.create("learned_gate")], context)
    weights = rule(bank.rows(torch.arange(100, 200))).weights
    assert weights[3:].sum(0).mean() > 0.7
    fused = fuse(bank, [rule])
    assert float((fused.targets == truth).double().mean()) > 0.97
    with pytest.raises(ValueError, match=r"data\.validation"):
        fit_rules([FUSIONS.create("learned_gate")], FitContext(bank))


def test_impossible_options_are_named() -> None:
    for name, option, value in [
        ("era", "temperature", 0), ("enhanced_era", "beta", 0), ("energy", "temperature", -1),
        ("knowledge_vote", "confidence", 1.5), ("trimmed_mean", "share", 0.5),
        ("cronus", "share", 0.5), ("geometric_median", "iterations", 0),
        ("consensus", "least", 0), ("consensus", "share", 0.5), ("history", "rate", 0),
        ("coverage", "least", -1), ("learned_gate", "steps", 0),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=f"fusion '{name}': {option} must be .*, got {value}"):
            FUSIONS.create(name, **{option: value})
    with pytest.raises(ValueError, match="fusion 'merge' is gone: take enhanced_era with beta: 1"):
        FUSIONS.create("merge")
    with pytest.raises(TypeError, match="fusion 'era' has no option 'temprature'; did you mean"):
        FUSIONS.get("era")(temprature=1.0)


def test_sample_count_is_proportional_and_capped() -> None:
    weights = FUSIONS.create("sample_count")(ensemble()).weights[:, 0]
    assert torch.allclose(weights, torch.tensor([51.0, 43.0, 20.0]) / 114)
    greedy = ensemble()
    teachers = (Teacher(0, 10**9), *greedy.teachers[1:])
    liar = Ensemble(teachers, greedy.tensors, greedy.weights)
    capped = FUSIONS.create("sample_count", cap=2.0)(liar).weights[:, 0]
    assert torch.allclose(capped, torch.tensor([86.0, 43.0, 20.0]) / 149)


def test_entropy_listens_to_the_sure() -> None:
    logits = torch.tensor([[[9.0, 0, 0]], [[0.1, 0, 0]]])
    pair = Ensemble((Teacher(0), Teacher(1)), {Logits(): logits}, torch.full((2, 1), 0.5))
    weights = FUSIONS.create("entropy")(pair).weights[:, 0]
    assert weights[0] > 0.95


def test_class_gate_trusts_the_teacher_that_saw_the_class() -> None:
    """A teacher that saw one class calls everything so; it must not drown the one who knows."""
    teachers = (Teacher(0, 101, (100, 0, 1)), Teacher(1, 60, (0, 30, 30)))
    logits = torch.tensor([[[3.0, -6.0, 0.0]], [[-4.0, 0.0, 5.0]]])
    pair = Ensemble(teachers, {Logits(): logits}, torch.full((2, 1), 0.5))
    uniform = pair.mean_probabilities()
    gated = FUSIONS.create("class_gated")(pair)
    assert gated.weights[1, 0] > 0.7
    assert gated.mean_probabilities().argmax() == 2
    assert uniform[0, 0] > 0.4
    assert gated.class_weights is not None
    assert gated.class_weights[0, 1] == 0  # no weight for a class it never saw


def test_class_gate_without_counts_is_an_error() -> None:
    blind = Ensemble((Teacher(0),), {Logits(): torch.zeros(1, 1, 3)}, torch.ones(1, 1))
    with pytest.raises(ValueError, match="class counts of client 0"):
        FUSIONS.create("class_gated")(blind)
