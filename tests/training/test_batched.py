"""Many teachers trained together are those trained one after the other."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import nn

import fedkd
from fedkd.data.images import ImageSet
from fedkd.models.network import Network
from fedkd.training.batched import fit_many
from fedkd.training.supervised import Fit, fit

SIZES = (13, 8, 17)


@cache
def _shards() -> list[ImageSet]:
    images, _ = fedkd.load_dataset("synthetic", classes=3, size=8, per_class=15)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return [images.subset(part) for part in order[: sum(SIZES)].split(list(SIZES))]


def _teachers(model: str | nn.Module = "mlp") -> list[Network]:
    return [fedkd.network(model, _shards()[0], seed=seed) for seed in range(len(SIZES))]


def test_each_teacher_is_trained_as_alone() -> None:
    options = {"epochs": 2, "batch_size": 4, "augment": "crop"}
    together, alone = _teachers(), _teachers()
    fits = fit_many(together, _shards(), seeds=[5, 6, 7], **options)
    wanted = [
        fit(teacher, shard, seed=seed, **options)
        for teacher, shard, seed in zip(alone, _shards(), [5, 6, 7])
    ]
    assert fits == wanted
    for one, other in zip(together, alone):
        assert all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))


def test_a_client_that_fails_does_not_stop_the_others() -> None:
    teachers = _teachers()
    with torch.no_grad():
        next(teachers[1].parameters()).fill_(float("nan"))
    first, failed, last = fit_many(teachers, _shards(), seeds=[5, 6, 7], epochs=1)
    assert isinstance(first, Fit)
    assert isinstance(last, Fit)
    assert isinstance(failed, RuntimeError)
    assert "not finite before its training" in str(failed)


def test_as_many_shards_as_teachers() -> None:
    with pytest.raises(ValueError, match="shards: expected one for each of 3 teachers, got 2"):
        fit_many(_teachers(), _shards()[:2], seeds=[5, 6, 7])
