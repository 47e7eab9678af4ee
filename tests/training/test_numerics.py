"""Settings of torch last as long as the block that asked for them."""

import pytest
import torch

from fedkd.config import make_experiment
from fedkd.rounds import computing
from fedkd.training.graph import Captured, check_graphs, default_graphs
from fedkd.training.numerics import deterministic, numerics
from tests.conftest import TINY

CPU = torch.device("cpu")


def _settings() -> tuple[bool, ...]:
    cudnn = torch.backends.cudnn
    return torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark


def test_deterministic_is_for_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = _settings()
    with deterministic(False):
        assert _settings() == before
    with deterministic(True), numerics(CPU, "tf32"):
        assert _settings() == (True, True, False)
    assert _settings() == before


def test_a_run_computes_as_its_resources_say() -> None:
    threads, before = torch.get_num_threads(), _settings()
    overrides = ["resources.graphs=on", "resources.deterministic=true"]
    with computing(make_experiment(TINY, overrides).resources, 2):
        assert torch.get_num_threads() == 2
        assert _settings()[0]
        assert Captured(lambda: None, CPU).captures
        assert not Captured(lambda: None, CPU, "off").captures
    assert (torch.get_num_threads(), _settings()) == (threads, before)
    assert not Captured(lambda: None, CPU).captures
    assert make_experiment(TINY, ["resources.graphs=off"]).resources.graphs == "off"


def test_graphs_are_on_off_or_auto() -> None:
    assert [check_graphs(value) for value in (True, False, "auto")] == ["on", "off", "auto"]
    with pytest.raises(ValueError, match="graphs: expected auto, on or off, got 'always'"):
        check_graphs("always")
    with default_graphs("off"):
        assert Captured(lambda: None, CPU, "on").captures


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_tf32_ends_with_the_block() -> None:
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    with numerics(torch.device("cuda"), "tf32"):
        assert matmul.allow_tf32
    assert matmul.allow_tf32 == before
