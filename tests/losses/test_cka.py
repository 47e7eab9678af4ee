"""1 - CKA as a loss."""

import torch

from fedkd.functional.similarity import linear_cka, rbf_cka, unbiased_cka
from fedkd.losses.cka import cka_loss
from tests.losses.contract import draw


def test_it_is_one_less_the_measure():
    x, y = draw(8, 5), draw(8, 3, seed=1)
    torch.testing.assert_close(cka_loss(x, y), 1 - linear_cka(x, y))
    rbf = cka_loss(x, y, similarity="rbf", sigma=0.5)
    torch.testing.assert_close(rbf, 1 - rbf_cka(x, y, sigma=0.5))
    torch.testing.assert_close(cka_loss(x, y, similarity="unbiased"), 1 - unbiased_cka(x, y))
