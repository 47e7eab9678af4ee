"""Parameters and multiply-adds against counts by hand."""

import pytest
import torch
from torch import Tensor, nn

from fedkd.models.costs import Size, size_of
from fedkd.models.network import Network


class Attention(nn.Module):
    """Attention of four heads over 16 pixels of width 8, then a classifier."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 4, dim_feedforward=16, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 1), nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        tokens = images.flatten(2).transpose(1, 2).expand(-1, -1, 8)
        return self.head(self.encoder(tokens).mean(1))


def test_linear_layers_and_convolutions_count_their_products() -> None:
    body = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Flatten(), nn.Linear(4 * 64, 5))
    network = Network(body, mean=[0.5], std=[0.5])
    expected = Size(4 * 9 + 4 + 4 * 64 * 5 + 5, 64 * 4 * 9 + 4 * 64 * 5)
    assert size_of(network, (1, 8, 8)) == expected
    body[0].requires_grad_(False)
    assert size_of(network, (1, 8, 8)) == expected  # what is frozen costs as much


@pytest.mark.parametrize("training", [False, True])
def test_attention_counts_in_whatever_kernel_it_runs(training: bool) -> None:
    network = Network(Attention(), mean=[0.5], std=[0.5]).train(training)
    tokens, width = 16, 8
    projections, products, mlp = 4 * tokens * width**2, 2 * tokens**2 * width, 2 * tokens * 8 * 16
    size = size_of(network, (1, 4, 4))
    assert size.multiply_adds == projections + products + mlp + width * 3
    assert network.training is training
    assert torch.backends.mha.get_fastpath_enabled()
