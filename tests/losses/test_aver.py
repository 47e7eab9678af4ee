"""The plain mean over teachers: official numbers."""

import torch

from fedkd.knowledge.kinds import Logits
from fedkd.knowledge.payload import Ensemble, Teacher
from fedkd.losses import LOSSES
from fedkd.losses.aver import aver_loss
from fedkd.losses.kd import kd_loss
from tests.golden.published import published, repeats

GOLDEN = published("multi_teacher")
_inputs = GOLDEN.answers


def test_aver_repeats_the_official_code():
    case = GOLDEN["official"]["multi_teacher_kl_average_loss"]
    student, teachers = _inputs(torch.float32)
    value = aver_loss(student, teachers).mean()
    repeats(case, value, student, rel=1e-6, rtol=1e-5, atol=1e-7)


def test_aver_is_the_weighted_sum_of_kd():
    student, teachers = _inputs(torch.float64)
    weights = torch.tensor([[0.2, 0, 1, 0.3], [0.3, 0, 0, 0.3], [0.5, 1, 0, 0.4]]).double()
    ensemble = Ensemble(tuple(map(Teacher, range(3))), {Logits(): teachers}, weights)
    value = LOSSES.create("aver", temperature=2.0)({Logits(): student}, ensemble, None)
    terms = [w * kd_loss(student, t, temperature=2.0) for w, t in zip(weights, teachers)]
    torch.testing.assert_close(value, torch.stack(terms).sum(dim=0), rtol=1e-12, atol=1e-14)
