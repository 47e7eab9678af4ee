"""What would tell of private images beside the accounted mechanism, refused by its key."""

from __future__ import annotations

from collections.abc import Sequence

from fedkd.config import ConfigError, Experiment
from fedkd.fusion.base import Fusion
from fedkd.knowledge.kinds import DataStatistic, Kind


def check_leaks(experiment: Experiment, rules: Sequence[Fusion], kinds: Sequence[Kind]) -> None:
    """Refuse a config that promises privacy and discloses something outside of the promise.

    Raises:
        ConfigError: names the key, what leaks, and what to do.
    """
    privacy = experiment.teachers.privacy
    if privacy is None:
        return
    for rule, built in zip(experiment.fusion, rules):
        if built.discloses:
            raise ConfigError(
                f"fusion: {rule.name!r} discloses {', '.join(built.discloses)}, which no noise "
                "covers; with teachers.privacy take a rule that reads the answers only (uniform, "
                "entropy, coverage, consensus)"
            )
    for kind in kinds:
        if isinstance(kind, DataStatistic):
            raise ConfigError(
                f"fusion: {kind} is computed from the clients' images themselves, which training "
                "privately does not protect; with teachers.privacy take another rule"
            )
    if experiment.evaluation.clients:
        raise ConfigError(
            "evaluation.clients: must be false with teachers.privacy: accuracy on private images "
            "is not covered by the budget"
        )
    if "ceiling" in experiment.evaluation.baselines:
        raise ConfigError(
            "evaluation.baselines: 'ceiling' is trained on all private images without noise; take "
            "it out with teachers.privacy"
        )
    if experiment.release is not None:
        raise ConfigError(
            "release: cannot be combined with teachers.privacy: two promises about the same images "
            "would have to be added up; choose one"
        )
