"""What a config asks of this machine, and this machine has not."""

from __future__ import annotations

import os

import torch

from fedkd.config import ConfigError, Experiment
from fedkd.runs.tracking import check_trackers


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
    cpus, gpus = os.cpu_count() or 1, torch.cuda.device_count()
    if workers and resources.client_cpus > cpus:
        raise ConfigError(
            f"resources.client_cpus: {resources.client_cpus} asked for each client, but this "
            f"machine has {cpus}; set resources.client_cpus={cpus} or less"
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
