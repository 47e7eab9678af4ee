"""The steps of a training on noisy labels repeat the published code."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedkd.functional.noisy_labels import (
    clean_probability,
    rescaled,
    soft_cross_entropy,
)
from fedkd.training.loop import Phase, Trainer
from fedkd.training.noisy.options import Mix
from fedkd.training.noisy.steps import (
    Labelled,
    Mixed,
    forget_step,
    mix_step,
    mix_weight,
    reference_step,
    warmup_step,
)
from fedkd.training.optimizers import Optimizer
from tests.golden.published import published, repeats

GOLDEN = published("noisy_labels")
OFFICIAL = GOLDEN["official"]
_double = GOLDEN.double


def linear(name: str) -> nn.Linear:
    weight = _double(name)
    network = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=torch.float64)
    network.weight.data = weight
    return network


def after_one_step(network, measure):
    """Weights after one step of the one loop."""
    sgd = Optimizer("sgd", lr=0.1, momentum=0, weight_decay=0, schedule="constant")
    Trainer(network, sgd, Phase("the teacher"), 1).epoch(1, [None], measure)
    return network.weight.detach()


def test_a_learning_step_moves_the_weights_as_the_published_one_does():
    case = OFFICIAL["acdu_one_step_train"]
    network, partner = linear("W"), linear("W2")
    labelled = Labelled(
        [_double("acd_imgs_x"), _double("acd_imgs_x2")],
        _double("acd_labels").long(),
        _double("acd_clean").float(),
    )
    weight = mix_weight(14 + 0 / 2, 10, Mix())

    def measure(_step, _batch):
        return mix_step(
            network,
            [network, partner],
            labelled,
            [_double("acd_imgs_u"), _double("acd_imgs_u2")],
            Mixed(0.73, _double("acd_perm").long()),
            weight=weight,
        )

    expected = torch.tensor(case["value"], dtype=torch.float64)
    torch.testing.assert_close(after_one_step(network, measure), expected, rtol=1e-9, atol=1e-12)


def test_a_forgetting_step_moves_the_weights_as_the_published_one_does():
    case = OFFICIAL["acdu_one_step_forget"]
    network, copy, images = linear("W"), linear("W2"), _double("acd_imgs_x")

    def measure(_step, _batch):
        return forget_step(network(images), copy(images), temperature=0.05)

    expected = torch.tensor(case["value"], dtype=torch.float64)
    torch.testing.assert_close(after_one_step(network, measure), expected, rtol=1e-9, atol=1e-12)


def test_losses_are_followed_and_judged_as_published():
    case = OFFICIAL["acdu_eval_train_gmm"]
    losses = rescaled(torch.tensor(GOLDEN["inputs"]["acd_loss"], dtype=torch.float32))
    torch.testing.assert_close(losses, torch.tensor(case["rescaled"]), rtol=1e-5, atol=1e-7)
    expected = torch.tensor(case["value"], dtype=torch.float64)
    torch.testing.assert_close(clean_probability(losses[None]), expected, rtol=1e-5, atol=1e-9)


def test_the_warmup_of_the_partner_is_the_published_loss():
    logits = _double("logits_s").requires_grad_()
    certainty, classes = _double("acd_clip_cos").max(dim=1)
    step = reference_step(logits, classes, certainty)
    repeats(OFFICIAL["acdu_warmup_vit"], step.loss, logits)


def test_the_penalty_of_the_warmup_is_the_published_loss():
    logits, labels = _double("logits_s").requires_grad_(), _double("acd_labels").long()
    step = warmup_step(logits, labels, penalty=True)
    repeats(OFFICIAL["acdu_negentropy"], step.parts["penalty"], logits)
    torch.testing.assert_close(step.loss, F.cross_entropy(logits, labels) + step.parts["penalty"])


@pytest.mark.parametrize("moment", ["0", "10", "10.5", "18", "26", "100"])
def test_the_weight_of_guesses_rises_as_published(moment):
    expected = OFFICIAL["acdu_linear_rampup"]["value"][moment]
    assert mix_weight(float(moment), 10, Mix()) == expected


def test_the_labelled_part_is_the_published_one() -> None:
    """The unlabelled part is in the step that is repeated whole."""
    logits, targets = _double("logits_s").requires_grad_(), _double("acd_x1").softmax(dim=1)
    repeats(OFFICIAL["acdu_semiloss_Lx_mid"], soft_cross_entropy(logits, targets).mean(), logits)
