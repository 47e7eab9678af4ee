"""What a study of attacks consists of."""

from __future__ import annotations

from typing import Literal

import torch

from fedkd.attacks import ATTACKS
from fedkd.build import check, check_component
from fedkd.config import (
    Component,
    ConfigError,
    Experiment,
    Fraction,
    NamedList,
    Participation,
    one_head,
)
from fedkd.fusion import FUSIONS
from fedkd.randomness import stream
from fedkd.studies.config import Name, StudyConfig

# Tried before the others: what it costs to lose the attackers altogether.
FIRST = "absent"

CLEAN = "clean"


class AttackConfig(StudyConfig):
    """Every attack on every fusion rule.

    Attributes:
        experiment: The federation. Its fusion is the default that the others are compared to.
        rules: Chains of fusion rules beside the default; empty for each registered rule alone.
        attacks: What attackers do; empty for all there is.
        share: Share of the clients that attack, at least one client.
        seeds: Each with its own split, teachers, attackers and students.
    """

    study: Literal["attack"] = "attack"
    name: Name = "attack"
    experiment: Experiment = Experiment()
    rules: tuple[NamedList, ...] = ()
    attacks: NamedList = ()
    share: Fraction = 0.3

    @property
    def num_attackers(self) -> int:
        """How many clients attack."""
        return max(1, round(self.share * self.experiment.clients))

    def chains(self) -> dict[str, tuple[Component, ...]]:
        """Fusion rules by label, the default first."""
        others = self.rules or tuple((Component(name=name),) for name in FUSIONS.names())
        return {label(chain): chain for chain in (self.experiment.fusion, *others)}

    def threats(self) -> dict[str, Component]:
        """Attacks by label, silence first."""
        chosen = self.attacks or tuple(Component(name=name) for name in ATTACKS.names())
        chosen = (Component(name=FIRST), *chosen)
        return {label((attack,)): attack for attack in chosen}


def resolved(config: AttackConfig) -> AttackConfig:
    """With every rule and attack named, so that it stays the same when more are added."""
    rules, attacks = tuple(config.chains().values()), tuple(config.threats().values())
    return config.model_copy(update={"rules": rules, "attacks": attacks})


def attackers_of(config: AttackConfig, seed: int) -> tuple[int, ...]:
    """Who attacks: drawn once per seed, the same for all rules and attacks."""
    order = torch.randperm(config.experiment.clients, generator=stream(seed, "attackers"))
    return tuple(sorted(order[: config.num_attackers].tolist()))


def label(chain: tuple[Component, ...]) -> str:
    """`class_gated → entropy(temperature=0.5)`: as shown in tables."""
    return " → ".join(
        part.name
        + (f"({', '.join(f'{k}={v}' for k, v in part.options.items())})" if part.options else "")
        for part in chain
    )


def check_config(config: AttackConfig) -> None:
    """Raise `ConfigError` for what cannot be run."""
    check(config.experiment)
    for number, chain in enumerate(config.rules):
        for place, rule in enumerate(chain):
            check_component(FUSIONS, rule, f"rules.{number}.{place}")
    for number, attack in enumerate(config.attacks):
        check_component(ATTACKS, attack, f"attacks.{number}")
    if config.num_attackers >= config.experiment.clients:
        raise ConfigError(
            f"share: {config.num_attackers} of {config.experiment.clients} clients would attack; "
            "at least one must be honest"
        )
    if (codec := config.experiment.federation.codec.name) not in ("float16", "float32"):
        raise ConfigError(
            f"experiment.federation.codec: expected float16 or float32, got {codec!r}: attacks "
            "change plain numbers"
        )
    if config.experiment.federation.participation != Participation():
        raise ConfigError(
            "experiment.federation.participation: expected the default: all clients of an attack "
            "study answer in every round"
        )
    if config.experiment.release is not None:
        raise ConfigError("experiment.release: expected none, since attacks are on fusion rules")
    if config.experiment.evaluation.best:
        raise ConfigError(
            "experiment.evaluation.best: expected false, since what an attack does is seen in the "
            "student of the last round"
        )
    if config.experiment.data.transfer.pairs:
        raise ConfigError(
            "experiment.data.transfer.pairs: expected none, since attackers exchange labels of one "
            "data set"
        )
    one_head(config.experiment.student, "an attack", "experiment.student.heads")
    if config.experiment.teachers.classes is not None:
        raise ConfigError(
            "experiment.teachers.classes: expected none, since attacks change answers about all "
            "classes"
        )
    if config.experiment.teachers.feedback.use != "none":
        raise ConfigError(
            "experiment.teachers.feedback.use: expected none, since the teachers are trained once "
            "for all students of the study"
        )
