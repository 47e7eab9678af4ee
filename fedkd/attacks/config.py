"""What a study of attacks consists of."""

from __future__ import annotations

from fedkd.attacks import ATTACKS
from fedkd.build import check, check_component
from fedkd.config import Component, ConfigError, Experiment, Fraction, NamedList, Section
from fedkd.fusion import FUSIONS

# Tried before the others: what it costs to lose the attackers altogether.
FIRST = "absent"


class AttackStudy(Section):
    """Every attack on every fusion rule.

    Attributes:
        name: Of the study; names its folder.
        experiment: The federation. Its fusion is the default that the others are compared to.
        rules: Chains of fusion rules beside the default; empty for each registered rule alone.
        attacks: What attackers do; empty for all there is.
        share: Share of the clients that attack, at least one client.
        seeds: Each with its own split, teachers, attackers and students.
        output: Folder of the study's folder.
    """

    name: str = "attack"
    experiment: Experiment = Experiment()
    rules: tuple[NamedList, ...] = ()
    attacks: NamedList = ()
    share: Fraction = 0.3
    seeds: tuple[int, ...] = (0,)
    output: str = "runs"

    @property
    def plugins(self) -> tuple[str, ...]:
        """Modules to import."""
        return self.experiment.plugins

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


def resolved(study: AttackStudy) -> AttackStudy:
    """The study with every rule and attack named, so that it stays the same when more are added."""
    rules, attacks = tuple(study.chains().values()), tuple(study.threats().values())
    return study.model_copy(update={"rules": rules, "attacks": attacks})


def label(chain: tuple[Component, ...]) -> str:
    """`class_gated → entropy(temperature=0.5)`: as shown in tables."""
    return " → ".join(
        part.name
        + (f"({', '.join(f'{k}={v}' for k, v in part.options.items())})" if part.options else "")
        for part in chain
    )


def check_study(study: AttackStudy) -> None:
    """Raise `ConfigError` for what cannot be run."""
    check(study.experiment)
    for number, chain in enumerate(study.rules):
        for place, rule in enumerate(chain):
            check_component(FUSIONS, rule, f"rules.{number}.{place}")
    for number, attack in enumerate(study.attacks):
        check_component(ATTACKS, attack, f"attacks.{number}")
    if not study.seeds:
        raise ConfigError("seeds: at least one")
    if study.num_attackers >= study.experiment.clients:
        raise ConfigError(
            f"share: {study.num_attackers} of {study.experiment.clients} clients would attack; "
            "at least one must be honest"
        )
    if (codec := study.experiment.federation.codec.name) not in ("float16", "float32"):
        raise ConfigError(
            f"experiment.federation.codec: expected float16 or float32, got {codec!r}: attacks "
            "change plain numbers"
        )
    if study.experiment.release is not None:
        raise ConfigError("experiment.release: expected none, since attacks are on fusion rules")
    if study.experiment.teachers.feedback.use != "none":
        raise ConfigError(
            "experiment.teachers.feedback.use: expected none, since the teachers are trained once "
            "for all students of the study"
        )
