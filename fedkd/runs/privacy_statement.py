"""What a run has promised and spent, in one place: `privacy.json`, the report and the summary."""

from __future__ import annotations

import math
from collections.abc import Mapping

from typing_extensions import TypedDict

from fedkd.config import Experiment
from fedkd.models.linear import body_of, seen_by
from fedkd.privacy.plan import plan
from fedkd.privacy.release.gaussian import epsilon_of
from fedkd.runs.directory import RunDirectory
from fedkd.runs.events import (
    AnswersReleased,
    ClientsAsked,
    ClientTrained,
    RoundFinished,
    SumAsked,
)
from fedkd.runs.results import ClientPrivacy, PrivacyRecord

FILE = "privacy.json"

_EVERYBODY = "everybody: the server, the other clients, the student's readers"
_READERS = "the other clients and the student's readers; not against the server"


class _Spent(TypedDict):
    mechanism: str
    against: str
    clients: dict[str, ClientPrivacy]
    worst: float


def statement(run: RunDirectory) -> PrivacyRecord | None:
    """What is protected, against whom, under what assumption, and what it has cost so far.

    Worked out from the run's config and events alone. Epsilon is per client and for the whole run
    so far; `worst` is the largest of them. None for a run that promises nothing.
    """
    experiment = run.experiment
    if experiment.release is not None:
        return _release(run, experiment)
    if experiment.teachers.privacy is not None:
        return _teachers(run, experiment)
    return None


def _teachers(run: RunDirectory, experiment: Experiment) -> PrivacyRecord:
    privacy = experiment.teachers.privacy
    assert privacy is not None
    cohorts = run.events(ClientsAsked)
    asked = {c for each in cohorts for c in each.asked} if cohorts else range(experiment.clients)
    clients: dict[int, ClientPrivacy] = {
        client: {"epsilon": 0.0, "frozen_in": []} for client in sorted(asked)
    }
    for event in run.events(ClientTrained):
        if event.epsilon is None:
            continue
        mine = clients[event.client]
        mine["epsilon"] = max(mine["epsilon"], event.epsilon)
        if not event.trained and event.round not in mine["frozen_in"]:
            mine["frozen_in"].append(event.round)
    facts: _Spent = {
        "mechanism": privacy.mechanism,
        "against": _EVERYBODY,
        "clients": {str(client): mine for client, mine in clients.items()},
        "worst": max((mine["epsilon"] for mine in clients.values()), default=0.0),
    }
    planned = plan(experiment)
    if planned is None:
        assert privacy.epsilon is not None  # label_dp has no other parameter
        return {
            **facts,
            "protects": "the label of one private image; not the image, nor that it was used",
            "assumes": "clients run this code",
            "budget": privacy.epsilon,
            "delta": 0.0,
            "how": f"randomised response, {_rounds(len(run.events(RoundFinished)))} on one draw",
        }
    steps = planned.steps
    models = experiment.teachers.models
    adapted = any("peft" in m.options or body_of(m.name, m.options) for m in models)
    features = dict.fromkeys(seen_by(model.name, model.options) for model in models)
    return {
        **facts,
        "protects": "whether one image, with its label, is among one client's private images",
        "assumes": "clients run this code; who is drawn and the noise stay secret"
        + ("; the frozen weights show no private images" if adapted else ""),
        "budget": planned.epsilon,
        "delta": planned.delta,
        "how": (
            f"DP-SGD, {steps.count} steps a round for {_rounds(planned.rounds)}, sampling rate "
            f"{steps.sample_rate:.4g}, noise {steps.noise_multiplier:.4g} times the clipping norm "
            f"{planned.mechanism.max_grad_norm:g}; {privacy.accountant.upper()} accountant"
            + "".join(f"; a linear layer on {what}" for what in features if what)
        ),
    }


def _release(run: RunDirectory, experiment: Experiment) -> PrivacyRecord:
    assert experiment.release is not None
    # A round that was taken up again records the same release twice.
    events = {event.round: event for event in run.events(AnswersReleased)}
    options = experiment.release.options
    delta = float(options.get("delta", 1e-5))
    spent = epsilon_of(math.hypot(*(event.mu for event in events.values())), delta)
    unit = options.get("unit", "example")
    what = "one image of one client" if unit == "example" else "all images of one client"
    answered = sum(event.answered for event in events.values())
    asked = sum(event.cells for event in events.values())
    questions = f"{asked} cells of alike images asked about, " if asked else ""
    checked = experiment.release.name == "confident_gnmax"
    secure = options.get("secure")
    sums = run.events(SumAsked)
    each = {
        client: epsilon_of(math.hypot(*(s.mu for s in sums if client in s.clients)), delta)
        if secure is not None
        else spent
        for client in range(experiment.clients)
    }
    number = _rounds(len(events))
    how = f"{questions}{answered} answers in {number}, Gaussian noise, exact accounting"
    if secure is not None:
        how = (
            f"{questions}{answered} answers in {number}, Gaussian noise by the clients, exact "
            f"accounting; secure sums asked for, each paid for: {len(sums)}"
        )
    return {
        "mechanism": experiment.release.name,
        "protects": what,
        "against": _READERS if secure is None else _summed(secure),
        "assumes": (
            "the server is trusted with every client's answers, and clients run this code"
            if secure is None
            else "clients run this code, each on a machine of its own and with the keys of the "
            "others (in a simulation all are one process, and see each other)"
        ),
        "budget": options["epsilon"],
        "delta": delta,
        "how": how + "; the epsilon follows from noisy checks, promised is the budget" * checked,
        "clients": {
            str(client): {"epsilon": mine, "frozen_in": []} for client, mine in each.items()
        },
        "worst": max(each.values()),
    }


def _rounds(number: int) -> str:
    return "1 round" if number == 1 else f"{number} rounds"


def _summed(secure: Mapping[str, int]) -> str:
    """Against whom a secure sum protects."""
    most, few = secure.get("colluding", 0), secure.get("missing", 0)
    who = f"at most {most} of the clients collude" if most else "no client colludes"
    away = f"; up to {few} may be missing" if few else ""
    return f"{_EVERYBODY}, if {who} with the server{away}"


def write_statement(run: RunDirectory) -> None:
    """Put it beside the run's other files; nothing for a run that promises nothing."""
    facts = statement(run)
    if facts is not None:
        run.write_json(FILE, facts)
