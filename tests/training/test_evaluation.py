"""Confidence that can be believed."""

import pytest
import torch

from fedkd.training.evaluation import best_temperature, calibration


def test_the_best_temperature_is_the_one_that_labels_were_drawn_with():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4000, 5, generator=generator)
    labels = torch.multinomial(torch.softmax(3 * logits, 1), 1, generator=generator)[:, 0]
    assert best_temperature(logits, labels) == pytest.approx(1 / 3, rel=0.05)
    scaled = logits / best_temperature(logits, labels)
    assert calibration(scaled, labels).ece < 0.03 < calibration(logits, labels).ece
    assert best_temperature(logits, logits.argmax(1)) == pytest.approx(0.05, rel=0.01)
    assert best_temperature(logits, logits.argmin(1)) == pytest.approx(20, rel=0.01)
