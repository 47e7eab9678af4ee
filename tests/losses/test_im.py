"""Information maximisation: golden numbers, extremes, weights."""

import math

import torch

from fedkd.losses.im import im_loss
from tests.losses.contract import draw


def test_it_is_the_entropy_on_images_less_that_over_them() -> None:
    p = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3]], dtype=torch.float64)
    each = -(p * p.log()).sum(dim=1)
    mean = p.mean(dim=0)
    expected = each.mean() + (mean * mean.log()).sum()
    torch.testing.assert_close(im_loss(p.log()), expected)


def test_it_is_least_where_each_image_is_sure_and_all_classes_occur() -> None:
    sure = 1e4 * torch.eye(4)
    torch.testing.assert_close(im_loss(sure), torch.tensor(-math.log(4)))
    assert im_loss(sure[:1].expand(4, -1)) == 0  # all of one class
    assert im_loss(torch.zeros(4, 4)).abs() < 1e-6  # nobody is sure
    assert im_loss(draw(16, 4)) > -math.log(4)


def test_samples_count_by_their_weights() -> None:
    logits = draw(4, 3)
    weights = torch.tensor([1.0, 0.0, 1.0, 0.0])
    torch.testing.assert_close(im_loss(logits, weights=weights), im_loss(logits[::2]) / 2)
    assert im_loss(logits, weights=torch.zeros(4)) == 0
