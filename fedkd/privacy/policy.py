"""What a node allows, whatever a message asks for.

The config of a run comes with every message, from the server. A policy lies beside the node's
images, is its owner's, and no message overrides it: what may be disclosed, the weakest promise
under which private images are trained on, how much of it in all, what may be loaded, how much work
is done. A simulation has none: there the config is the owner's own.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any, Literal

from pydantic import Field

from fedkd.config import Component, Experiment, Fraction, NamedList, Positive, Section, load_config
from fedkd.data.cohorts import how_many
from fedkd.fusion.base import Fusion
from fedkd.knowledge.kinds import Kind
from fedkd.models.hub import HF
from fedkd.models.linear import body_of
from fedkd.privacy.release import RELEASES
from fedkd.privacy.release.base import Release, Secure

Mechanism = Literal["none", "release", "label_dp", "secure_sum", "dp_sgd"]
# What a node that asks for one of them accepts. A secure sum protects images as DP-SGD does, but
# only while few enough collude, so it stands in for neither of the others; but for a release, which
# trusts the server with all answers.
_ACCEPTED: dict[str, tuple[str, ...]] = {
    "none": ("none", "release", "label_dp", "secure_sum", "dp_sgd"),
    "release": ("release", "secure_sum", "dp_sgd"),
    "label_dp": ("label_dp", "dp_sgd"),
    "secure_sum": ("secure_sum", "dp_sgd"),
    "dp_sgd": ("dp_sgd",),
}


class PolicyRefused(RuntimeError):
    """The node's policy does not allow what a message asks for; the message names the line."""


class Disclose(Section):
    """What may leave the node."""

    kinds: tuple[str, ...] = Field(default=(), description="kinds of knowledge, e.g. logits")
    num_examples: bool = Field(default=False, description="how many images the node has")
    class_counts: bool = Field(default=False, description="how many of each class")
    training: bool = Field(default=False, description="loss and accuracy on the private images")
    holdout: Fraction = Field(
        default=0.0,
        description="share of the images on which a student may be judged, once a run; 0: never",
    )


class Promise(Section):
    """The weakest promise under which private images are trained on.

    Stronger mechanisms are accepted: dp_sgd where another is asked for, secure_sum where release
    is, and all where none is. A release is what a trusted server promises.
    """

    mechanism: Mechanism = "none"
    epsilon: float | None = Field(
        default=None, gt=0, description="of all runs on these images together; null: any"
    )
    delta: float | None = Field(
        default=None, gt=0, lt=1, description="largest; must also be below 1 / images held"
    )
    clients: Positive | None = Field(
        default=None, description="`secure_sum`: fewest clients in a sum; null: any number"
    )
    colluding: int = Field(
        default=0, ge=0, description="`secure_sum`: fewest that may collude with the server"
    )


class Limits(Section):
    """How much work a message may ask for."""

    rounds: Positive | None = None
    epochs: Positive | None = Field(default=None, description="of local training in a round")
    parameters: Positive | None = Field(default=None, description="of a network built here")
    seconds: float | None = Field(default=None, gt=0, description="of training in a round")
    disk_mb: float | None = Field(default=None, gt=0, description="of the node's state folder")
    payload_mb: float | None = Field(default=None, gt=0, description="of one answer")


class Policy(Section):
    """A node's own terms; what a list does not name is refused."""

    disclose: Disclose = Disclose()
    promise: Promise = Promise()
    datasets: NamedList = Field(
        default=(),
        description="with these very options; `public` where nodes have their own images",
    )
    models: NamedList = Field(
        default=(), description="teachers, student and assistants, with these very options"
    )
    plugins: tuple[str, ...] = Field(default=(), description="modules that a config may import")
    limits: Limits = Limits()

    @classmethod
    def of(
        cls,
        experiment: Experiment,
        kinds: Collection[Kind],
        rules: Sequence[Fusion],
        parameters: int,
    ) -> Policy:
        """The strictest policy under which the experiment runs, once."""
        teachers, privacy = experiment.teachers, experiment.teachers.privacy
        discloses = {name for rule in rules for name in rule.discloses}
        promise = Promise()
        if privacy is not None:
            promise = Promise(mechanism=privacy.mechanism, epsilon=_epsilon(experiment))
            if privacy.mechanism == "dp_sgd":
                promise = promise.model_copy(update={"delta": _delta(experiment)})
        elif (secure := _secure(experiment)) is not None:
            promise = Promise(
                mechanism="secure_sum",
                epsilon=_epsilon(experiment),
                delta=_delta(experiment),
                clients=secure.least(_asked(experiment)),
                colluding=secure.colluding,
            )
        elif experiment.release is not None:
            promise = Promise(
                mechanism="release", epsilon=_epsilon(experiment), delta=_delta(experiment)
            )
        return cls(
            disclose=Disclose(
                kinds=tuple(sorted(str(kind) for kind in kinds)),
                num_examples="num_examples" in discloses,
                class_counts="class_counts" in discloses,
                training=not experiment.promises,
                holdout=experiment.data.holdout if judges(experiment) else 0.0,
            ),
            promise=promise,
            datasets=tuple(_datasets(experiment)),
            models=tuple(dict.fromkeys(_models(experiment))),
            plugins=experiment.plugins,
            limits=Limits(
                rounds=experiment.rounds,
                epochs=teachers.epochs,
                parameters=parameters,
                seconds=experiment.federation.deadline,
                payload_mb=experiment.federation.max_payload_mb,
                disk_mb=4096,
            ),
        )


def load_policy(path: Path) -> Policy:
    """Read a policy file. Raises `ConfigError`."""
    return load_config(Policy, path)


def explained(policy: Policy) -> Iterator[str]:
    """The policy in sentences, for its owner."""
    out, promise, limits = policy.disclose, policy.promise, policy.limits
    sent = [*out.kinds]
    sent += ["how many images there are"] if out.num_examples else []
    sent += ["how many of each class"] if out.class_counts else []
    sent += ["loss and accuracy of training"] if out.training else []
    yield f"tells the server: {', '.join(sent) or 'nothing'}"
    if out.holdout:
        yield f"judges one student per run on at most {out.holdout:.0%} of its images"
    if promise.mechanism == "none":
        yield "trains without any promise about its images"
    else:
        total = "any epsilon" if promise.epsilon is None else f"epsilon {promise.epsilon:g}"
        delta = "" if promise.delta is None else f", delta {promise.delta:g}"
        how = f"trains under {promise.mechanism} or stronger"
        if promise.mechanism == "release":
            how = "trusts the server with its answers if that lets them out under noise only"
        yield f"{how}: {total}{delta} over all runs"
    if promise.mechanism == "secure_sum":
        yield (
            f"answers only in secure sums over {promise.clients or 'any number of'} clients or "
            f"more, of whom {promise.colluding} or more may collude with the server"
        )
    yield (
        f"loads {', '.join(_shown(c) for c in policy.datasets) or 'no data set'}; builds "
        f"{', '.join(_shown(c) for c in policy.models) or 'no network'}; imports "
        f"{', '.join(policy.plugins) or 'no plugin'}"
    )
    known = {key: value for key, value in limits if value is not None}
    yield "at most " + (", ".join(f"{key} {value:g}" for key, value in known.items()) or "anything")


def judges(experiment: Experiment) -> bool:
    """Whether clients may be asked to judge a student on private images."""
    return experiment.evaluation.clients and not experiment.promises


def check_config(policy: Policy, experiment: Experiment) -> None:
    """Refuse what the config alone shows, before anything is imported, read or built.

    Raises:
        PolicyRefused: names the line of the policy and what was asked for.
    """
    limits, teachers = policy.limits, experiment.teachers
    _within("plugins", policy.plugins, experiment.plugins)
    _within("datasets", policy.datasets, _datasets(experiment))
    _within("models", policy.models, _models(experiment))
    for model in _models(experiment):
        _below_root(model)
    _at_most("limits.rounds", limits.rounds, experiment.rounds)
    work = teachers.epochs
    if teachers.feedback.use == "align":
        work += teachers.feedback.epochs
    _at_most("limits.epochs", limits.epochs, work)
    if experiment.data.label_noise is not None:
        raise PolicyRefused(
            "data.label_noise: a node trains on the labels that it has; to put wrong ones in their "
            "place is for simulations"
        )
    privacy = teachers.privacy
    secure = _secure(experiment)
    offered: Mechanism = "none" if privacy is None else privacy.mechanism
    if secure is not None:
        offered = "secure_sum"
    elif experiment.release is not None:
        offered = "release"
    if offered not in _ACCEPTED[policy.promise.mechanism]:
        raise PolicyRefused(
            f"promise.mechanism: this node trains under {policy.promise.mechanism}, the run "
            f"promises {offered}"
        )
    if secure is not None:
        _at_least("promise.clients", policy.promise.clients or 0, secure.least(_asked(experiment)))
        _at_least("promise.colluding", policy.promise.colluding, secure.colluding)
    if offered != "none":
        _at_most("promise.epsilon", policy.promise.epsilon, _epsilon(experiment))
        if offered != "label_dp":
            _at_most("promise.delta", policy.promise.delta, _delta(experiment))
    if judges(experiment):
        _at_most("disclose.holdout", policy.disclose.holdout, experiment.data.holdout)
    if not experiment.promises and not policy.disclose.training:
        raise PolicyRefused(
            "disclose.training: false, and a run that promises nothing reports the loss and "
            "accuracy of training"
        )


def check_shared(
    policy: Policy, kinds: Collection[Kind], rules: Sequence[Fusion], parameters: int
) -> None:
    """Refuse what the built experiment would share or build.

    Raises:
        PolicyRefused: names the line of the policy and what was asked for.
    """
    _within("disclose.kinds", policy.disclose.kinds, [str(kind) for kind in kinds])
    for rule in rules:
        for name in rule.discloses:
            if not getattr(policy.disclose, name):
                raise PolicyRefused(f"disclose.{name}: false, and a fusion rule asks for it")
    _at_most("limits.parameters", policy.limits.parameters, parameters)


def _datasets(experiment: Experiment) -> Iterator[Component]:
    if experiment.data.public is not None:
        yield Component(name="public")
        return
    pairs = experiment.data.transfer.pairs
    yield from (side.dataset for side in pairs.values()) if pairs else (experiment.data.dataset,)
    if experiment.data.transfer.dataset is not None:
        yield experiment.data.transfer.dataset


def _below_root(model: Component) -> None:
    """A file that the server names is one of those that this node keeps for such runs."""
    name, options = body_of(model.name, model.options) or (model.name, model.options)
    given = name.removeprefix(HF) if name.startswith(HF) else options.get("weights")
    path = PurePath(str(given))
    if given is not None and (path.is_absolute() or ".." in path.parts or path.parts[:1] == ("~",)):
        raise PolicyRefused(
            f"models: {name} with weights {given!r}: this node reads files below its own "
            "data-root only; name the file relative to it"
        )


def _models(experiment: Experiment) -> Iterator[Component]:
    yield from experiment.teachers.models
    noisy = experiment.teachers.noisy
    if noisy is not None and noisy.partner.model is not None:
        yield noisy.partner.model
    yield experiment.student.model
    yield from experiment.distillation.assistants


def _secure(experiment: Experiment) -> Secure | None:
    """Options of a secure sum; None without one."""
    return _release(experiment).secure if experiment.sums_securely else None


def _release(experiment: Experiment) -> Release:
    assert experiment.release is not None
    try:
        return RELEASES.create(experiment.release.name, **experiment.release.options)
    except ValueError as error:
        raise PolicyRefused(f"release: {error}") from None


def _asked(experiment: Experiment) -> int:
    return how_many(experiment.federation.participation.ask, experiment.clients)


def _epsilon(experiment: Experiment) -> float | None:
    from fedkd.privacy.plan import plan

    if experiment.teachers.privacy is None:
        return _release(experiment).epsilon
    privacy = experiment.teachers.privacy
    planned = plan(experiment)
    return privacy.epsilon if planned is None else planned.epsilon


def _delta(experiment: Experiment) -> float:
    from fedkd.privacy.plan import delta_of

    if experiment.teachers.privacy is None:
        return _release(experiment).delta
    return delta_of(experiment.teachers.privacy)


def _within(line: str, allowed: Collection[Any], asked: Iterable[Any]) -> None:
    for item in asked:
        if item not in allowed:
            raise PolicyRefused(
                f"{line}: the run asks for {_shown(item)}, this node allows "
                f"{', '.join(map(_shown, allowed)) or 'none'}"
            )


def _shown(item: Any) -> str:
    return item if isinstance(item, str) else json.dumps(item.model_dump(mode="json"))


def _at_least(line: str, limit: int, asked: int) -> None:
    if asked < limit:
        raise PolicyRefused(f"{line}: the run has {asked}, this node needs at least {limit}")


def _at_most(line: str, limit: float | None, asked: Any) -> None:
    if limit is not None and (asked is None or not asked <= limit * (1 + 1e-9)):
        raise PolicyRefused(f"{line}: the run asks for {asked}, this node allows {limit}")
