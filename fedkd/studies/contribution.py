"""What each client gives to the ensemble: leave-one-out influence and fair (Shapley) shares.

Everything is computed from what the run stored. Nothing is trained: the measure is the fused
ensemble of some of the teachers on the test images. What a client gives to the *student* is
measured by `leave_one_out_students`, which distils anew for every client.

References:
    Shapley, "A Value for n-Person Games", 1953.
    Ghorbani, Zou, "Data Shapley: Equitable Valuation of Data for Machine Learning", ICML 2019,
        https://arxiv.org/abs/1904.02868 (permutation sampling with truncation).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, NotRequired, TypedDict, cast

import numpy as np
import torch
from torch import Tensor

from fedkd.config import ConfigError, one_head
from fedkd.fusion.base import fit_rules
from fedkd.knowledge.payload import fuse
from fedkd.knowledge.query import Images
from fedkd.randomness import stream
from fedkd.rounds import ExperimentContext, Notify, evidence_of, silent
from fedkd.rounds.server_teachers import server_teachers_of
from fedkd.runs.directory import RunDirectory
from fedkd.runs.export import load_student
from fedkd.studies.unlearning import distil_again, finished_rounds, prepare
from fedkd.training.evaluation import accuracy, predict

# Up to this many teachers all 2^M coalitions are tried.
EXACT_UP_TO = 8
# A permutation is cut short once the coalition is this close to everybody (accuracy and nats).
TRUNCATE = 0.002

Value = Callable[[frozenset[int]], Tensor]


@dataclass(frozen=True)
class Shares:
    """Shapley values of the members of a game with several measures.

    Attributes:
        values: (M, K), a member's share of each measure; columns sum to v(all) - v(nobody),
            up to the truncation if sampled.
        errors: (M, K), standard errors; zeros if exact.
        permutations: How many were sampled; 0 if exact.
    """

    values: Tensor
    errors: Tensor
    permutations: int


def shapley(members: int, value: Value) -> Shares:
    """Exact shares over all 2^M coalitions of members 0 to M - 1.

    Args:
        members: M.
        value: Coalition -> (K,) measures.
    """
    worth = {
        frozenset(chosen): value(frozenset(chosen)).double()
        for size in range(members + 1)
        for chosen in combinations(range(members), size)
    }
    rows = []
    for member in range(members):
        share = torch.zeros_like(worth[frozenset()])
        for coalition, amount in worth.items():
            if member not in coalition:
                weight = 1 / (members * math.comb(members - 1, len(coalition)))
                share = share + weight * (worth[coalition | {member}] - amount)
        rows.append(share)
    values = torch.stack(rows)
    return Shares(values, torch.zeros_like(values), 0)


def sampled_shapley(
    members: int,
    value: Value,
    *,
    permutations: int,
    generator: torch.Generator,
    tolerance: float = TRUNCATE,
    on_permutation: Callable[[int], None] = lambda _done: None,
) -> Shares:
    """Shares as means over random orders of arrival.

    The rest of an order is taken for zero once the first two measures are within `tolerance` of
    those of everybody; further measures are cut there with them.

    Args:
        members: M.
        value: Coalition -> (K,) measures.
        permutations: Orders drawn, at least 2.
        generator: Draws them.
        tolerance: Largest difference that is taken for none; 0 never truncates.
        on_permutation: Called with how many are done.
    """
    if permutations < 2:
        raise ValueError(f"standard errors need at least 2 permutations, got {permutations}")
    nobody, everybody = value(frozenset()).double(), value(frozenset(range(members))).double()
    gains = torch.zeros(permutations, members, len(nobody), dtype=torch.double)
    for number in range(permutations):
        before, coalition = nobody, frozenset[int]()
        for member in torch.randperm(members, generator=generator).tolist():
            if float((everybody - before)[:2].abs().max()) < tolerance:
                break
            coalition = coalition | {member}
            after = value(coalition).double()
            gains[number, member] = after - before
            before = after
        on_permutation(number + 1)
    errors = gains.std(dim=0) / math.sqrt(permutations)
    return Shares(gains.mean(dim=0), errors, permutations)


def ensemble_game(
    run: RunDirectory, context: ExperimentContext, round_number: int
) -> tuple[list[int], Value]:
    """Clients who answered, and the worth of each coalition of them.

    The measures are accuracy, mean log-likelihood (nats) and accuracy per class of the fused
    ensemble on the test images, (2 + C,). Nobody's prediction is uniform. Fusion rules are fitted
    to each coalition anew, as in a first round: without memory, and with the run's last student
    where a rule looks at one.

    Raises:
        ConfigError: the teachers were not asked about the test images.
    """
    one_head(run.experiment.student, "a contribution", f"{run.path}: student.heads")
    answers, asked = run.knowledge(round_number), run.knowledge(round_number, Images.TEST)
    clients = [client for client in asked.clients() if client in answers.clients()]
    if not clients:
        raise ConfigError(
            f"round {round_number} holds no answers about the test images "
            "(evaluation.teachers: true asks for them)"
        )
    transfer, test = answers.bank(context.kinds), asked.bank(context.prediction_kinds)
    data = context.data
    labels = data.test.labels
    assert labels is not None
    truth = labels
    classes = len(data.classes)
    per_class = torch.nn.functional.one_hot(truth, classes).double()
    count = per_class.sum(0)
    looks = any(rule.needs_student for rule in context.fusion)
    student = load_student(run, data) if looks else None
    evidence = evidence_of(context, run, round_number, transfer, student)
    test = server_teachers_of(context).beside(test, Images.TEST, round_number)
    seen: dict[frozenset[int], Tensor] = {}

    def measure(probabilities: Tensor) -> Tensor:
        right = (probabilities.argmax(1) == truth).double()
        chance = probabilities.double().gather(1, truth[:, None]).clamp(min=1e-12)
        by_class = (right @ per_class) / count.clamp(min=1)
        return torch.cat([right.mean()[None], chance.log().mean()[None], by_class])

    def value(coalition: frozenset[int]) -> Tensor:
        if coalition not in seen:
            if not coalition:
                # Argmax of equal chances is class 0: expected accuracy of a guess instead.
                guess = torch.full((2 + classes,), 1 / classes, dtype=torch.double)
                guess[1] = -math.log(classes)
                seen[coalition] = guess
            else:
                names = {clients[member] for member in coalition}
                rules = fit_rules(context.fusion, evidence.only(names))
                seen[coalition] = measure(fuse(test.only(names), rules).probabilities)
        return seen[coalition]

    return clients, value


Numbers = Mapping[str, float | list[float]]
"""Of one client, or of one coalition: measure -> value, or values per class."""


class Measured(TypedDict):
    """One round: what all give together, what guessing gives, and what each client adds."""

    permutations: int
    everybody: Numbers
    nobody: Numbers
    clients: dict[int, Numbers]


class Contribution(Measured):
    """What `contribution.json` holds, over one round or several."""

    run: str
    rounds: list[int]
    classes: list[str]
    fusion: list[str]
    students: NotRequired[dict[str, Any]]


def contribution(
    run: RunDirectory,
    context: ExperimentContext,
    *,
    all_rounds: bool = False,
    permutations: int = 200,
    notify: Notify = silent,
) -> Contribution:
    """Who carries the ensemble, as plain values; also written to `contribution.json`.

    Args:
        run: A finished run.
        context: What its config means.
        all_rounds: The mean over all rounds; else the last round.
        permutations: Orders drawn with more than `EXACT_UP_TO` teachers.
        notify: Receives progress.
    """
    rounds = finished_rounds(run)
    rounds = rounds if all_rounds else rounds[-1:]
    measured = [_round(run, context, number, permutations, notify) for number in rounds]
    facts: Contribution = {
        "run": run.identity,
        "rounds": rounds,
        "classes": list(context.data.classes),
        "fusion": [rule.name for rule in run.experiment.fusion],
        "permutations": max(r["permutations"] for r in measured),
        "everybody": _mean_of([r["everybody"] for r in measured]),
        "nobody": measured[0]["nobody"],
        "clients": {
            client: _mean_of([r["clients"][client] for r in measured if client in r["clients"]])
            for client in sorted({c for r in measured for c in r["clients"]})
        },
    }
    old = run.read_json("contribution.json") or {}
    if "students" in old:
        facts["students"] = old["students"]
    run.write_json("contribution.json", facts)
    return facts


def leave_one_out_students(
    run: RunDirectory, context: ExperimentContext, notify: Notify = silent
) -> Contribution:
    """The student distilled anew without each client in turn, all rounds; added to the JSON.

    Slow: as many distillations as clients. They are kept under `contribution/` of the run and
    taken up again.
    """
    clients = sorted({c for r in finished_rounds(run) for c in run.knowledge(r).clients()})
    truth = context.data.test.labels
    assert truth is not None
    images = context.data.test.images
    whole = accuracy(predict(load_student(run, context.data), images), truth)
    table = {}
    for done, client in enumerate(clients):
        notify("client", client=client, done=done, clients=len(clients))
        new = prepare(run, [client], run.path / "contribution")
        server = distil_again(new, context, notify)
        alone = accuracy(predict(server.student, images), truth)
        table[client] = {"accuracy_without": alone, "influence": whole - alone}
    facts = cast(Contribution, run.read_json("contribution.json") or {})
    facts["students"] = {"accuracy": whole, "clients": table}
    run.write_json("contribution.json", facts)
    return facts


def _round(
    run: RunDirectory, context: ExperimentContext, number: int, permutations: int, notify: Notify
) -> Measured:
    clients, value = ensemble_game(run, context, number)
    members = len(clients)
    if members <= EXACT_UP_TO:
        shares = shapley(members, value)
    else:
        shares = sampled_shapley(
            members, value, permutations=permutations,
            generator=stream(run.experiment.seed, "contribution", number),
            on_permutation=lambda done: notify(
                "permutation", done=done, total=permutations, round=number
            ),
        )  # fmt: skip
    everybody = frozenset(range(members))
    whole, nothing = value(everybody), value(frozenset())
    rows: dict[int, Numbers] = {}
    for member, client in enumerate(clients):
        lost = whole - value(everybody - {member})
        share, error = shares.values[member], shares.errors[member]
        rows[client] = {
            "share": float(share[0]),
            "share_error": float(error[0]),
            "share_log_likelihood": float(share[1]),
            "influence": float(lost[0]),
            "influence_log_likelihood": float(lost[1]),
            "per_class": share[2:].tolist(),
            "influence_per_class": lost[2:].tolist(),
        }
    return {
        "permutations": shares.permutations,
        "everybody": {"accuracy": float(whole[0]), "log_likelihood": float(whole[1])},
        "nobody": {"accuracy": float(nothing[0]), "log_likelihood": float(nothing[1])},
        "clients": rows,
    }


def _mean_of(records: Sequence[Numbers]) -> Numbers:
    return {
        key: np.mean([record[key] for record in records], axis=0).tolist() for key in records[0]
    }
