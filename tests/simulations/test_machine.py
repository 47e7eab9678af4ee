"""What a process may use of its machine."""

import os

import pytest

from fedkd.config import ConfigError
from fedkd.simulations.machine import check_machine, cpus_here
from tests.conftest import Tiny


def test_a_share_in_slurm_and_an_affinity_bound_what_clients_get(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    monkeypatch.setattr("fedkd.simulations.machine.CONTAINER", "/nowhere")
    assert cpus_here() == 4
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "3")
    assert cpus_here() == 3
    check_machine(tiny("resources.total_cpus=3"))
    with pytest.raises(ConfigError, match=r"client_cpus: 4 asked for each .* may use 3"):
        check_machine(tiny("resources.client_cpus=4"))
    with pytest.raises(ConfigError, match=r"total_cpus: 4 asked for, .* may use 3"):
        check_machine(tiny("resources.total_cpus=4"))


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["resources.total_cpus=2", "resources.client_cpus=4"], "fewer than one client's"),
        (["resources.total_cpus=2", "resources.ray_address=auto"], "ray start --num-cpus"),
    ],
)
def test_bounds_that_cannot_hold_are_refused(tiny: Tiny, words: list[str], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        tiny(*words)
