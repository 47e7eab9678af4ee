"""Clients of a group learn what each would learn alone, whatever the server gives back to them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedkd.models.network import Network
from fedkd.rounds import experiment_context
from fedkd.rounds.client import Client, train_together
from fedkd.training.supervised import Fit, Regulariser
from tests.conftest import Tiny


def _weights(client: Client, round_number: int) -> Tensor:
    saved = client._files.teacher(round_number)
    assert saved is not None
    return torch.cat([tensor.flatten().double() for tensor in saved.weights.values()])


@pytest.mark.parametrize(
    ("use", "warm_start"),
    [("none", True), ("none", False), ("init", True), ("regulariser", True), ("align", True)],
)
def test_feedback(
    use: str, warm_start: bool, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = tiny(
        "teachers.models=[{name: cnn_tiny, norm: batch}]",
        "teachers.optimizer={name: sgd}",
        f"teachers.warm_start={warm_start}",
        f"teachers.feedback.use={use}",
    )
    context = experiment_context(experiment)
    student = context.network(experiment.student.model, "student").state_dict()
    made: list[Regulariser] = []
    begin = Regulariser.__init__

    def counted(self: Regulariser, network: Network, **options: float) -> None:
        made.append(self)
        begin(self, network, **options)

    monkeypatch.setattr(Regulariser, "__init__", counted)
    clients = [
        [Client(context, number, "run", tmp_path / way / str(number)) for number in range(3)]
        for way in ("together", "alone")
    ]
    for number, given in ((1, None), (2, student)):
        made.clear()
        found = train_together(clients[0], number, given)
        assert len(made) == (use == "regulariser" and number == 2)
        for client, other, result in zip(*clients, found, strict=True):
            wanted = other.train(number, given)
            assert isinstance(result, Fit)
            assert result.loss == pytest.approx(wanted.loss, rel=1e-3)
            assert result.accuracy == pytest.approx(wanted.accuracy, abs=0.05)
            one, two = _weights(client, number), _weights(other, number)
            assert float((one - two).norm()) < 1e-4 * float(two.norm())
