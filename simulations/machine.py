"""What a config asks of this machine, and this machine has not."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from fedkd.config import ConfigError, Experiment
from fedkd.runs.tracking import check_trackers

# Microseconds of CPU that a container may use, in how many.
CONTAINER = "/sys/fs/cgroup/cpu.max"


def cpus_here() -> int:
    """CPUs that this process may use: its affinity, a container's limit, its share in SLURM."""
    affinity = getattr(os, "sched_getaffinity", None)
    bounds = [len(affinity(0)) if affinity else os.cpu_count() or 1]
    try:
        quota, period = Path(CONTAINER).read_text(encoding="ascii").split()
        bounds.append(max(1, int(quota) // int(period)))
    except (OSError, ValueError):  # no such limit, or `max`
        pass
    if (share := os.environ.get("SLURM_CPUS_PER_TASK", "")).isdecimal():
        bounds.append(max(1, int(share)))
    return min(bounds)


def check_machine(experiment: Experiment, *, workers: bool = True) -> None:
    """Refuse CPUs and GPUs for the clients that are not here, and trackers that are not.

    Args:
        experiment: What is to be run on this machine.
        workers: Each client has processors of its own (Ray), or all share a process.

    Raises:
        ConfigError: named by its key, with the number there is.
        MissingExtra: a tracker's library is not installed here.
    """
    check_trackers(experiment.track)
    resources = experiment.resources
    if workers and resources.ray_address is not None:
        return  # other machines have them, and Ray knows which
    cpus, gpus = cpus_here(), torch.cuda.device_count()
    if workers and (resources.total_cpus or 0) > cpus:
        raise ConfigError(
            f"resources.total_cpus: {resources.total_cpus} asked for, but this process may use "
            f"{cpus}; set resources.total_cpus={cpus} or leave it out"
        )
    if workers and resources.client_cpus > cpus:
        raise ConfigError(
            f"resources.client_cpus: {resources.client_cpus} asked for each client, but this "
            f"process may use {cpus}; set resources.client_cpus={cpus} or less"
        )
    if resources.client_gpus > gpus:
        there = f"has {gpus}" if gpus else "has no GPU that PyTorch can use"
        raise ConfigError(
            f"resources.client_gpus: {resources.client_gpus:g} asked for each client, but this "
            f"machine {there}; set resources.client_gpus={gpus}"
        )
    if resources.client_gpus > 1 and resources.client_gpus % 1:
        raise ConfigError(
            f"resources.client_gpus: expected a share below 1 or a whole number, got "
            f"{resources.client_gpus:g}"
        )
