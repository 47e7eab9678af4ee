"""Which rules an edge aggregator can apply to its clients, so that nothing but sums go on."""

import pytest
import torch
from torch import Tensor

from fedkd.fusion import FUSIONS
from fedkd.fusion.base import FitContext, Fusion, fit_rules
from fedkd.knowledge.kinds import DensityRatio, Logits
from fedkd.knowledge.payload import Bank, Ensemble, Teacher

CLASSES, SAMPLES = 4, 9
EDGES = ((0, 1, 2, 3), (4, 5), (6, 7, 8, 9, 10))
#: A teacher's weight, before normalisation, depends on this teacher and the sample alone.
SUMS = {
    "uniform": {},
    "sample_count": {"cap": 1e6},
    "entropy": {},
    "energy": {},
    "density_ratio": {"cap": 1e6},
}
#: Functions of the plain weighted mean: edges forward sums, the root applies the rule.
AT_THE_ROOT = ("era", "enhanced_era")


def clients(prior: Tensor | None = None) -> Ensemble:
    generator = torch.Generator().manual_seed(1)
    count = sum(map(len, EDGES))
    counts = torch.randint(1, 60, (count, CLASSES), generator=generator)
    teachers = tuple(
        Teacher(n, int(row.sum()), tuple(row.tolist())) for n, row in enumerate(counts)
    )
    tensors = {
        Logits(): 3 * torch.randn(count, SAMPLES, CLASSES, generator=generator),
        DensityRatio(): torch.rand(count, SAMPLES, generator=generator),
    }
    weights = torch.ones(count, SAMPLES) if prior is None else prior
    return Ensemble(teachers, tensors, weights / weights.sum(dim=0))


def some(whole: Ensemble, which: tuple[int, ...], prior: Tensor) -> Ensemble:
    """The clients of an edge, and a last teacher that every edge makes alike and knows nothing."""
    at = list(which)
    known = Teacher(len(prior), 1, (1,) * CLASSES)
    tensors = {
        Logits(): torch.cat([whole.logits[at], torch.zeros(1, SAMPLES, CLASSES)]),
        DensityRatio(): torch.cat([whole.tensors[DensityRatio()][at], torch.ones(1, SAMPLES)]),
    }
    weights = torch.cat([prior[at], torch.ones(1, SAMPLES)])
    teachers = (*(whole.teachers[n] for n in at), known)
    return Ensemble(teachers, tensors, weights / weights.sum(dim=0))


def fused(name: str, options: dict[str, float], item: Ensemble) -> Ensemble:
    rule: Fusion = FUSIONS.create(name, **options)
    bank = Bank(item.teachers, {k: list(t.numpy()) for k, t in item.tensors.items()},
                item.weights.numpy())  # fmt: skip
    labels = torch.arange(SAMPLES) % CLASSES
    (ready,) = fit_rules([rule], FitContext(bank, labels=labels, seed=3))
    return ready(item)


def in_two_stages(name: str, options: dict[str, float], whole: Ensemble, prior: Tensor) -> Tensor:
    """Each edge forwards sums, measured by the teacher all edges share; the root adds them up."""
    above: Tensor | float = 0.0
    below: Tensor | float = 0.0
    for edge in EDGES:
        after = fused(name, options, some(whole, edge, prior))
        unit = after.weights[-1]
        mean = after.mean_probabilities()
        above = above + (mean - unit[:, None] / CLASSES) / unit[:, None]
        below = below + (1 - unit) / unit
    assert isinstance(below, Tensor)
    return above / below[:, None]


@pytest.mark.parametrize("decayed", [False, True])
@pytest.mark.parametrize("name", SUMS)
def test_fusing_in_two_stages_equals_fusing_in_one(name: str, decayed: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    count = sum(map(len, EDGES))
    prior = torch.ones(count, SAMPLES)
    if decayed:  # weights that teachers bring along, of their age for example
        prior = 0.1 + 0.9 * torch.rand(count, SAMPLES, generator=generator)
    whole = clients(prior)
    once = fused(name, SUMS[name], whole).mean_probabilities()
    assert torch.allclose(in_two_stages(name, SUMS[name], whole, prior), once, atol=2e-5)


@pytest.mark.parametrize("name", AT_THE_ROOT)
def test_rules_of_the_mean_are_applied_at_the_root(name: str) -> None:
    whole, prior = clients(), torch.ones(sum(map(len, EDGES)), SAMPLES)
    once = fused(name, {}, whole).mean_probabilities()
    mean = in_two_stages("uniform", {}, whole, prior)
    root = Ensemble((Teacher(0),), {Logits(): mean.log()[None]}, torch.ones(1, SAMPLES))
    assert torch.allclose(FUSIONS.create(name)(root).mean_probabilities(), once, atol=1e-5)


@pytest.mark.parametrize("name", sorted(set(FUSIONS.names()) - set(SUMS)))
def test_all_other_rules_give_something_else_in_two_stages(name: str) -> None:
    whole = clients()
    once = fused(name, {}, whole).mean_probabilities()
    parts = []
    for edge in EDGES:
        at = list(edge)
        tensors = {kind: tensor[at] for kind, tensor in whole.tensors.items()}
        own = Ensemble(
            tuple(whole.teachers[n] for n in edge),
            tensors,
            torch.full((len(at), SAMPLES), 1 / len(at)),
        )
        parts.append(len(at) * fused(name, {}, own).mean_probabilities())
    twice = torch.stack(parts).sum(dim=0) / sum(map(len, EDGES))
    assert not torch.allclose(twice, once, atol=1e-3)
