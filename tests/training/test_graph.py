"""Captured steps: on a CPU the same code without a graph, on CUDA the graph itself."""

import logging

import pytest
import torch
from torch import Tensor, nn

from fedkd.training.graph import WARM, Captured

CUDA = torch.cuda.is_available()
DEVICES = ["cpu", *(["cuda"] if CUDA else [])]


def _training(device: str, graphs: str) -> tuple[Captured, nn.Module]:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))
    network = layers.to(device)
    fused = {"fused": True, "capturable": True} if device == "cuda" else {}
    optimizer = torch.optim.AdamW(network.parameters(), 0.01, **fused)

    def step(inputs: Tensor, wanted: Tensor) -> Tensor:
        loss = (network(inputs) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return Captured(step, torch.device(device), graphs, what="the test"), network


@pytest.mark.parametrize("device", DEVICES)
def test_replays_are_the_steps_themselves(device: str) -> None:
    """Also for an odd batch now and then, which has a capture of its own."""
    results = []
    for graphs in ("off", "on"):
        step, network = _training(device, graphs)
        torch.manual_seed(1)
        losses = []
        for number in range(4 * (WARM + 2)):
            size = 3 if number % 4 == 3 else 8
            draw = torch.Generator().manual_seed(number)
            inputs = torch.randn(size, 4, generator=draw).to(device)
            losses.append(step(inputs, inputs.sum(1, keepdim=True)).clone())
        results.append((torch.stack(losses), *(t.clone() for t in network.state_dict().values())))
        assert step.count == (0 if graphs == "off" else 2)
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0 if device == "cpu" else 1e-5, atol=1e-7)


def test_nothing_is_captured_on_a_cpu_unless_asked_for() -> None:
    step, _ = _training("cpu", "auto")
    assert not step.captures


def test_a_step_that_draws_or_counts_on_the_host_is_not_captured(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A capture would repeat the same draw for ever."""

    class Counting(nn.Module):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return x + self.calls

    counting = Counting()
    for function, modules, why in (
        (lambda x: x + torch.rand(()), (), "draws random numbers on the host"),
        (counting, (counting,), "counts on the host"),
    ):
        step = Captured(function, torch.device("cpu"), "on", modules=modules, what="the test")
        step._freezes = True
        with caplog.at_level(logging.WARNING):
            results = [float(step(torch.zeros(()))) for _ in range(2 * WARM)]
        assert len(set(results)) == 2 * WARM
        assert not step.captures
        assert [why in r.getMessage() for r in caplog.records] == [True]
        caplog.clear()


@pytest.mark.skipif(not CUDA, reason="needs CUDA")
def test_a_step_that_fetches_a_number_falls_back(caplog: pytest.LogCaptureFixture) -> None:
    step = Captured(lambda x: x * float(x.sum()), torch.device("cuda"), "auto", what="the test")
    with caplog.at_level(logging.WARNING):
        results = [float(step(torch.full((), 1.0 * n, device="cuda"))) for n in range(2 * WARM)]
    assert results == [n * n for n in range(2 * WARM)]
    assert [r.getMessage().count("fetches a number") for r in caplog.records] == [1]
