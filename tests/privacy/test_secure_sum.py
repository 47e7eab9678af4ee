"""Sums that nobody sees into: exact, noisy enough, paid for, and refused where they hide nobody."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dp_accounting.pld import privacy_loss_distribution as pld
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.supercore.task_identity import TaskIdentity

from fedkd.config import ConfigError, Experiment, make_experiment
from fedkd.io.tensors import load_state
from fedkd.privacy.accounting import Steps, epsilon
from fedkd.privacy.masking import key_pair, masked, roster_digest
from fedkd.privacy.noise import SecureGenerator
from fedkd.privacy.policy import Policy, PolicyRefused
from fedkd.privacy.release import RELEASES
from fedkd.privacy.release.base import Release, Secure
from fedkd.privacy.release.cells import Cells
from fedkd.privacy.release.gaussian import epsilon_of
from fedkd.privacy.release.secure import SCALE, SecureSum, closeness
from fedkd.rounds import ExperimentContext, Server
from fedkd.rounds.outlook import outlook
from fedkd.rounds.secure_sum import Roster, SumRefused
from fedkd.runs.directory import RunDirectory
from fedkd.runs.events import AnswersReleased, RoundFinished, SumAsked, Warned
from fedkd.runs.privacy_statement import statement
from fedkd.simulations.client_app import make_client_app
from fedkd.simulations.deploy.check import check_node
from fedkd.simulations.deploy.folder import read_settings, write_folder
from fedkd.simulations.deploy.identity import NodeKeys, signature_of
from fedkd.simulations.deploy.keys import node_pair
from fedkd.simulations.deploy.plan import Plan
from fedkd.simulations.deploy.supernode import arguments_of
from fedkd.simulations.local import run_local
from fedkd.simulations.ray import run_ray
from fedkd.strategies.records import JOB
from fedkd.strategies.secure_sum import roster_record
from tests.conftest import TINY, Tiny

pytestmark = pytest.mark.usefixtures("lean")

BASE = (
    "clients=4", "rounds=1", "teachers={models: [mlp], epochs: 1}", "student.model=mlp",
    "distillation={losses: [ce], epochs: 1}", "fusion=[uniform]", "evaluation.teachers=false",
    "evaluation.clients=false",
)  # fmt: skip
OPTIONS = "epsilon: 500.0, min_votes: 3, cells: 6"
SECURE = f"release={{name: gnmax, {OPTIONS}, secure: {{missing: 1, repeats: 1}}}}"


# The masks.


def keys_of(clients: int) -> tuple[dict[int, bytes], dict[int, bytes]]:
    pairs = {client: key_pair() for client in range(clients)}
    return {c: p[0] for c, p in pairs.items()}, {c: p[1] for c, p in pairs.items()}


def test_masks_cancel_to_the_bit_among_all_of_a_roster_and_not_among_fewer() -> None:
    private, public = keys_of(5)
    values = np.random.default_rng(0).integers(0, 2**32, (5, 40), dtype=np.uint32)
    roster = roster_digest("run", 1, 1, public)
    sent = [masked(values[c], c, private[c], public, roster) for c in range(5)]
    assert (sum(sent[1:], sent[0]) == sum(values[1:], values[0])).all()
    assert not (sum(sent[1:4], sent[0]) == sum(values[1:4], values[0])).any()
    # Somebody who was given another roster hides in that one, with nobody.
    fewer = {c: public[c] for c in range(4)}
    sent[0] = masked(values[0], 0, private[0], fewer, roster_digest("run", 1, 1, fewer))
    assert not (sum(sent[1:], sent[0]) == sum(values[1:], values[0])).any()
    others = {roster_digest("run", 2, 1, public), roster_digest("run", 1, 2, public)}
    assert len({roster, roster_digest("other", 1, 1, public), *others}) == 4


def test_a_masked_vector_looks_like_random_numbers() -> None:
    private, public = keys_of(2)
    roster = roster_digest("run", 1, 1, public)
    sent = masked(np.zeros(20_000, np.uint32), 0, private[0], public, roster)
    bits = np.unpackbits(sent.view(np.uint8)).mean()
    assert abs(bits - 0.5) < 5 * 0.5 / math.sqrt(32 * 20_000)
    assert len(np.unique(sent)) > 19_900


def test_a_key_with_which_nothing_can_be_agreed_on_is_an_error() -> None:
    private, public = keys_of(2)
    with pytest.raises(ValueError, match="shared key"):
        masked(np.zeros(2, np.uint32), 0, private[0], {**public, 1: bytes(32)}, b"")


# The noise, and what it costs.


def release(name: str = "gnmax", **options: Any) -> Release:
    secure = Secure(**options.pop("secure", {}))
    given = {"epsilon": 2.0, "delta": 1e-4, "cells": 20, **options}
    return RELEASES.create(given.pop("name", name), **given, secure=secure)


@pytest.mark.parametrize("name", ["gnmax", "prob_sum"])
def test_sums_are_exact_without_noise_and_as_wide_as_planned_with_it(name: str) -> None:
    made = release(name, secure={"missing": 5, "colluding": 3, "repeats": 1})
    each = SecureSum.of(made, 60, 1, 20, 10)
    generator = torch.Generator().manual_seed(0)
    answers = torch.softmax(3 * torch.randn(60, 20, 10, generator=generator), dim=-1)
    parts = made.contributions(answers)
    plain = np.sum([each.encoded(part, None) for part in parts], axis=0, dtype=np.uint32)
    assert torch.allclose(each.decoded(plain), parts.sum(0), atol=60 / SCALE / 2, rtol=0)
    if name == "gnmax":
        assert torch.equal(each.decoded(plain), parts.sum(0))
    noise = SecureGenerator(1)
    noisy = np.sum([each.encoded(part, noise) for part in parts], axis=0, dtype=np.uint32)
    errors = each.decoded(noisy) - each.decoded(plain)
    expected = made.noise_on_votes(20, 1, 60) * made.wider(10, 1 / SCALE)
    assert expected == pytest.approx(each.deviation * math.sqrt(60) / SCALE, rel=1e-3)
    assert float(errors.std()) == pytest.approx(expected, rel=0.2)  # of 200 numbers: 4 sd
    # The 52 that are honest in the smallest sum hold the promise alone, for both sums.
    assert each.deviation * math.sqrt(52) / SCALE >= made.deviation(20, 1)
    assert epsilon_of(each.mu * math.sqrt(2), 1e-4) == pytest.approx(2.0, rel=1e-3)
    assert epsilon_of(each.mu * math.sqrt(2), 1e-4) <= 2.0


@pytest.mark.parametrize(
    ("clients", "sums", "questions", "eps"),
    [
        *((60, 1, 20, eps) for eps in (0.5, 1.0, 2.0, 5.0, 10.0)),
        *((60, 2, questions, 2.0) for questions in (2, 10, 40)),
        *((clients, 1, 20, 2.0) for clients in (12, 30, 1000)),
        (100, 3, 40, 10.0),
    ],
)
def test_what_sums_cost_is_what_discrete_gaussians_cost_elsewhere(
    clients: int, sums: int, questions: int, eps: float
) -> None:
    """Replacing a vote moves two numbers by a vote each: numbers beside each other, composed."""
    made = release(epsilon=eps, secure={"missing": 4, "colluding": 4, "repeats": sums - 1})
    each = SecureSum.of(made, clients, 1, questions, 10)
    honest = clients - 8
    # In steps of a hundredth of the noise: the library lists every value of a number.
    sigma = each.deviation * math.sqrt(honest) / SCALE
    fine = max(1, round(100 / sigma))
    one = pld.from_discrete_gaussian_mechanism(
        sigma * fine, sensitivity=fine, value_discretization_interval=1e-4
    )
    whole = one.self_compose(2 * questions * sums)
    theirs = whole.get_epsilon_for_delta(made.delta)
    assert theirs == pytest.approx(eps, rel=5e-3)
    assert epsilon([each.steps] * sums, made.delta, "gaussian") <= eps
    # Theorem 1 of Kairouz, Liu and Steinke: concentrated privacy, with what discreteness adds.
    tau = closeness(each.deviation, clients)
    concentrated = math.hypot(each.mu, math.sqrt(tau * each.size / 2))
    assert concentrated == pytest.approx(each.mu, rel=1e-12)


def test_the_bound_on_what_discreteness_adds_holds_where_it_can_be_seen() -> None:
    deviation, clients = 0.6, 3
    k = np.arange(-60, 61)
    one = np.exp(-(k**2) / (2 * deviation**2))
    both = np.convolve(np.convolve(one / one.sum(), one / one.sum()), one / one.sum())
    x = np.arange(-180, 181)
    ideal = np.exp(-(x**2) / (2 * clients * deviation**2))
    near = np.abs(x) <= 8
    gap = np.abs(np.log(both[near]) - np.log((ideal / ideal.sum())[near])).max()
    assert 0 < gap <= closeness(deviation, clients)
    assert closeness(4000.0, 60) == 0.0
    assert closeness(0.4, 3) == math.inf


def test_the_exact_accountant_is_for_steps_at_rate_one() -> None:
    whole = [Steps(1.0, 10.0, 4), Steps(1.0, 5.0, 1)]
    assert epsilon(whole, 1e-5, "gaussian") == epsilon_of(math.sqrt(0.08), 1e-5)
    mixed = [*whole, Steps(0.1, 2.0, 10)]
    assert epsilon(mixed, 1e-5, "gaussian") == epsilon(mixed, 1e-5, "prv")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"secure": {"missing": -1}}, "secure.missing must be at least 0"),
        ({"secure": {"missing": 40, "colluding": 19}}, "fewer than 2 to hide among"),
        ({"epsilon": 1e-6, "delta": 1e-9}, "may leave the range of 32 bits"),
        ({"epsilon": 1e9, "delta": 0.5}, "too coarse"),
        ({"name": "confident_gnmax"}, "takes one noisy sum"),
    ],
)
def test_sums_that_cannot_be_made_are_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SecureSum.of(release(**options), 60, 1, 20, 10)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("federation={mode: buffered, stale: {keep: 1}}",), "federation.stale.keep"),
        (("federation.participation={start: 3}",), "federation.participation.start: must be null"),
        (("federation.subset=0.5",), "federation.subset: must be 1"),
        (("federation.codec=int8",), "federation.codec: must be float16"),
        (("federation.quarantine.after=2",), "federation.quarantine.after: must be null"),
        (("federation.quorum=1.0",), "federation.quorum: a round needs 4 clients, a secure sum 3"),
        (("federation.participation.minimum=4",), "participation.minimum: a round needs 4"),
        (
            (SECURE.replace("missing: 1", "missing: 2"),),
            "release.secure.missing: 2 are too few for release 'gnmax'",
        ),
        (
            (SECURE.replace("min_votes: 3", "min_votes: 1").replace("missing: 1", "missing: 3"),),
            "release.secure: of 4 clients 3 may miss",
        ),
        ((SECURE.replace("missing", "mising"),), "secure: Unexpected keyword argument"),
        ((SECURE.replace("gnmax", "confident_gnmax"),), "takes one noisy sum"),
        ((SECURE.replace("500.0", "1e-6"),), "release.secure: noise of .* votes may leave"),
    ],
)
def test_what_does_not_go_with_secure_sums_is_refused_by_its_key(
    tiny: Tiny, overrides: tuple[str, ...], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        ExperimentContext(tiny(*BASE, SECURE, *overrides))


# Runs.


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """No noise, neither at the server nor at the clients."""
    monkeypatch.setattr(
        SecureGenerator, "discrete_gaussian",
        lambda self, shape, deviation: torch.zeros(shape, dtype=torch.int64),
    )  # fmt: skip


def scores(run: RunDirectory) -> torch.Tensor:
    return load_state(run.knowledge(1).folder / "released.pt")["scores"]


@pytest.mark.usefixtures("silent")
@pytest.mark.parametrize("name", ["gnmax, min_votes: 3", "prob_sum, min_clients: 3"])
@pytest.mark.parametrize("asks", ["cells: 6", "queries: 20"])
def test_without_noise_the_student_is_that_of_a_trusted_server(
    tiny: Tiny, name: str, asks: str
) -> None:
    plain = f"release={{name: {name}, epsilon: 50.0, {asks}}}"
    trusted = run_local(tiny(*BASE, plain))
    secure = run_local(tiny(*BASE, plain[:-1] + ", secure: {missing: 1}}"))
    assert scores(secure).shape == scores(trusted).shape
    assert torch.allclose(scores(secure), scores(trusted), atol=1e-3)
    if "gnmax" in name:
        hashes = {run.events(RoundFinished)[-1].hash for run in (trusted, secure)}
        assert len(hashes) == 1
    # Nothing of a single client is at the server.
    assert not list((secure.path / "knowledge").rglob("client-*"))
    assert {m.phase for m in secure.messages()} == {"describe", "train", "keys", "masked"}


def failing(kind: str, *clients: int, attempts: tuple[int, ...] = (1,)) -> ClientApp:
    """Some clients fail at one kind of message of a round's sums."""

    def mod(message: Message, context: Context, call_next: Any) -> Message:
        mine = int(context.node_config["partition-id"]) in clients
        record = message.content.config_records.get("sum", ConfigRecord())
        if mine and message.metadata.message_type == kind and record["attempt"] in attempts:
            raise OSError("the line is dead")
        return call_next(message, context)

    return make_client_app([mod])


def booked(run: RunDirectory, client: int) -> int:
    place = run.clients / f"client-{client:04d}" / "privacy.jsonl"
    return place.read_text().count('"reserve"') if place.is_file() else 0


def test_who_fails_between_key_and_votes_is_left_out_and_the_others_pay_twice(tiny: Tiny) -> None:
    run = run_local(tiny(*BASE, SECURE), client_app=failing("query.masked", 1))
    sums = run.events(SumAsked)
    assert [(e.attempt, e.clients) for e in sums] == [(1, [0, 1, 2, 3]), (2, [0, 2, 3])]
    (finished,) = run.events(RoundFinished)
    assert (finished.status, finished.answered) == ("ok", [0, 2, 3])
    assert len(run.events(AnswersReleased)) == 1
    # The one that failed may have answered for all that the server can prove.
    facts = statement(run)
    spent = {int(c): mine["epsilon"] for c, mine in facts["clients"].items()}
    mu = sums[0].mu
    assert spent[1] == pytest.approx(epsilon_of(mu, 1e-5))
    assert facts["worst"] == spent[0] == pytest.approx(epsilon_of(mu * math.sqrt(2), 1e-5))
    assert facts["worst"] == pytest.approx(500.0, rel=1e-2)
    assert "everybody: the server" in facts["against"]
    assert [booked(run, client) for client in range(4)] == [2, 0, 2, 2]


def test_a_sum_that_is_paid_for_no_more_leaves_the_round_without_one(tiny: Tiny) -> None:
    once = SECURE.replace(", repeats: 1", "")
    run = run_local(tiny(*BASE, once), client_app=failing("query.masked", 1))
    assert run.events(RoundFinished)[-1].status == "degraded"
    assert any("release.secure.repeats" in event.text for event in run.events(Warned))
    assert len(run.events(SumAsked)) == 1


def test_too_few_keys_cost_nobody_anything(tiny: Tiny) -> None:
    run = run_local(tiny(*BASE, SECURE), client_app=failing("query.keys", 1, 2))
    assert run.events(RoundFinished)[-1].status == "degraded"
    assert any("release.secure.missing" in event.text for event in run.events(Warned))
    assert not run.events(SumAsked)
    assert [booked(run, client) for client in range(4)] == [0, 0, 0, 0]
    assert statement(run)["worst"] == 0


@pytest.mark.slow
def test_processes_of_ray_sum_and_leave_one_out(tiny: Tiny) -> None:
    run = run_ray(tiny(*BASE, SECURE), client_app=failing("query.masked", 1))
    assert [e.clients for e in run.events(SumAsked)] == [[0, 1, 2, 3], [0, 2, 3]]
    assert run.events(RoundFinished)[-1].answered == [0, 2, 3]
    assert [booked(run, client) for client in range(4)] == [2, 0, 2, 2]


class Killed(BaseException):
    """What kill -9 looks like from inside."""


@pytest.mark.parametrize(
    ("dies_in", "sums", "status"),
    [("accept_sum", 2, "ok"), ("fuse", 1, "ok")],
)
def test_a_server_killed_in_a_sum_asks_again_and_one_killed_after_it_does_not(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, dies_in: str, sums: int, status: str
) -> None:
    def die(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Server, dies_in, die)
        with pytest.raises(Killed):
            run_local(tiny(*BASE, SECURE))
    (path,) = Path(tiny().output).iterdir()
    run = RunDirectory.open(path)
    run_local(run.experiment, run=run)
    assert len(run.events(SumAsked)) == sums
    assert run.events(RoundFinished)[-1].status == status
    assert [booked(run, client) for client in range(4)] == [sums] * 4
    mu = run.events(SumAsked)[0].mu * math.sqrt(sums)
    assert statement(run)["worst"] == pytest.approx(epsilon_of(mu, 1e-5))


def test_the_plan_tells_of_every_sum_that_is_paid_for(tiny: Tiny) -> None:
    trusted = outlook(tiny(*BASE, f"release={{name: gnmax, {OPTIONS}}}"))
    secure = outlook(tiny(*BASE, SECURE))
    assert (secure.rounds, secure.each) == (2, "sum")
    assert secure.asked == "6 cells, 2 sums in all"
    # Two sums, and four clients add noise where three are counted on.
    assert secure.noise == pytest.approx(trusted.noise * math.sqrt(2 * 4 / 3))
    assert secure.spent(2) == pytest.approx(500.0)


# A hostile server before nodes with keys and terms of their own.

Ask = Callable[..., RecordDict]


class Nodes:
    """Four nodes that know each other's keys; `ask(node, kind, ...)` is the server's message."""

    def __init__(self, folder: Path, experiment: Experiment, policy: Policy | None = None) -> None:
        self.experiment = experiment
        space = ExperimentContext(experiment)
        policy = policy or Policy.of(
            experiment, space.shared_kinds, space.fusion, space.largest_network
        )
        self.policy = policy
        (folder / "policy.yaml").write_text(policy.to_yaml())
        self.fingerprint = space.data.transfer.fingerprint
        self.cells = space.transfer_cells
        (folder / "peers").mkdir()
        self.contexts = []
        for number in range(4):
            pair = node_pair(str(number))
            (folder / "peers" / f"node-{number}.pub").write_bytes(pair.public)
            (folder / f"node-{number}.key").write_bytes(pair.private)
            config: dict[str, Any] = {
                "partition-id": number, "num-partitions": 4, "peers": str(folder / "peers"),
                "state-dir": str(folder / f"state-{number}"), "policy": str(folder / "policy.yaml"),
                "key": str(folder / f"node-{number}.key"),
            }  # fmt: skip
            self.contexts.append(
                Context(
                    run_id=1, node_id=number, state=RecordDict(), run_config={}, node_config=config
                )
            )
        TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1
        self.app = make_client_app()

    def ask(
        self, node: int, kind: str, round: int = 1, experiment: Experiment | None = None,
        run: str = "r1", **records: ConfigRecord,
    ) -> RecordDict:  # fmt: skip
        job = {
            "config": (experiment or self.experiment).to_bytes(), "run": run, "round": round,
            "state": "", "fingerprint": self.fingerprint,
        }  # fmt: skip
        content = RecordDict({JOB: ConfigRecord(job), **records})
        message = Message(content, dst_node_id=node, message_type=kind, ttl=600, group_id="1")
        message.metadata.__dict__["_message_id"] = "x"
        return self.app(message, self.contexts[node]).content

    def roster(self, attempt: int = 1, run: str = "r1") -> Roster:
        """Keys of all for one sum."""
        keys, signatures = {}, {}
        for node in range(4):
            asked = ConfigRecord({"attempt": attempt})
            answer = self.ask(node, "query.keys", sum=asked, run=run)["sum"]
            keys[node], signatures[node] = answer["key"], answer["signature"]
        return Roster(attempt, keys, signatures, self.cells)

    def vote(self, node: int, roster: Roster, **more: Any) -> np.ndarray:
        answer = self.ask(node, "query.masked", sum=roster_record(roster), **more)
        return np.frombuffer(answer["sum"]["values"], "<u4")


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Nodes:
    folder = tmp_path_factory.mktemp("nodes")
    # Sums enough for all tests of this module, each of which spoils some.
    options = SECURE.replace("repeats: 1", "repeats: 2")
    found = Nodes(folder, make_experiment(TINY, [f"output={folder}", *BASE, options]))
    for node in range(4):
        found.ask(node, "train")
    return found


def test_nodes_with_keys_sum_and_leave_no_key_on_a_disk(nodes: Nodes) -> None:
    roster = nodes.roster()
    state = Path(nodes.contexts[0].node_config["state-dir"])
    secret = bytes(nodes.contexts[0].state["sum.0"]["private"])
    total = sum(nodes.vote(node, roster).astype(np.uint32) for node in range(4))
    each = ExperimentContext(nodes.experiment).secure_sum(len(nodes.cells))
    counts = each.decoded(total)
    assert counts.sum(1).tolist() == pytest.approx([4.0] * 6, abs=6.0)
    assert counts.abs().max() < 10
    files = [path for path in state.rglob("*") if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}
    assert not any(secret in path.read_bytes() for path in files)
    with pytest.raises(SumRefused, match="no key for sum 1 of round 1"):  # a second time
        nodes.vote(0, roster)


def _without(roster: Roster, *gone: int) -> Roster:
    keys = {c: key for c, key in roster.keys.items() if c not in gone}
    return Roster(roster.attempt, keys, {c: roster.signatures[c] for c in keys}, roster.cells)


def _changed(roster: Roster, client: int, key: bytes) -> Roster:
    return Roster(
        roster.attempt, {**roster.keys, client: key}, roster.signatures, roster.cells
    )  # fmt: skip


HOSTILE: dict[str, tuple[Callable[[Roster], Roster], str]] = {
    "a sum over two": (lambda r: _without(r, 2, 3), "over 2 clients, at least 3"),
    "a sum without the client": (lambda r: _without(r, 0), "own key is not in the sum"),
    "its own key for another": (lambda r: _changed(r, 1, r.keys[0]), "the same key"),
    "a key that the server made": (
        lambda r: _changed(r, 1, key_pair()[1]), "not signed by client 1",
    ),
    "another client's signature": (
        lambda r: Roster(r.attempt, r.keys, {**r.signatures, 1: r.signatures[2]}, r.cells),
        "not signed by client 1",
    ),
    "no signatures": (lambda r: Roster(r.attempt, r.keys, {}, r.cells), "not signed by client 0"),
    "a client that is none": (
        lambda r: Roster(r.attempt, {**_without(r, 3).keys, 9: r.keys[3]},
                         {**_without(r, 3).signatures, 9: r.signatures[3]}, r.cells),
        "client 9 in the sum, there are 4",
    ),
    "a short key": (lambda r: r, "no roster"),
    "images in place of cells": (
        lambda r: Roster(r.attempt, r.keys, r.signatures, None), "asked about images",
    ),
    "a cell for every image": (
        lambda r: Roster(r.attempt, r.keys, r.signatures, Cells(torch.arange(48))),
        "48 images in at most 6 cells",
    ),
    "an empty cell": (
        lambda r: Roster(r.attempt, r.keys, r.signatures, Cells(torch.arange(48) % 2 * 3)),
        "a cell without images",
    ),
    "the roster of another sum": (
        lambda r: Roster(99, r.keys, r.signatures, r.cells), "no key for sum 99",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_roster_that_hides_nobody_is_refused_and_costs_nothing(nodes: Nodes, name: str) -> None:
    change, words = HOSTILE[name]
    roster = change(nodes.roster(2))
    record = roster_record(roster)
    if name == "a short key":
        record["keys"] = bytes(record["keys"])[:-1]
    ledger = next(Path(nodes.contexts[0].node_config["state-dir"]).glob("r1/*/privacy.jsonl"), None)
    before = "" if ledger is None else ledger.read_text()
    with pytest.raises((SumRefused, ValueError), match=words):
        nodes.ask(0, "query.masked", sum=record)
    assert before == ("" if ledger is None else ledger.read_text())


def test_a_client_in_a_secure_sum_answers_nothing_else(nodes: Nodes) -> None:
    for kind in ("query.knowledge", "evaluate"):
        with pytest.raises(PolicyRefused, match="in a secure sum alone"):
            nodes.ask(0, kind)


def test_a_node_that_asks_for_secure_sums_gives_no_plain_votes(nodes: Nodes) -> None:
    policy = nodes.policy.promise
    assert (policy.mechanism, policy.clients, policy.epsilon) == ("secure_sum", 3, 500.0)
    assert nodes.policy.disclose.kinds == ()
    options = SECURE.replace("repeats: 1", "repeats: 2")
    for change, line in (
        (f"release={{name: gnmax, {OPTIONS}}}", "promise.mechanism: this node trains under"),
        ("release=null", "promise.mechanism"),
        (options.replace("min_votes: 3", "min_votes: 2").replace("missing: 1", "missing: 2"),
         "promise.clients: the run has 2, this node needs at least 3"),
        (options.replace("500.0", "501.0"), "promise.epsilon"),
        (options.replace("cells: 6", "cells: 6, delta: 1e-4"), "promise.delta"),
    ):  # fmt: skip
        other = make_experiment(TINY, [*BASE, change])
        for kind in ("train", "query.knowledge", "query.masked"):
            with pytest.raises(PolicyRefused, match=f"^{line}"):
                nodes.ask(0, kind, experiment=other, run="r2")


def test_a_node_without_the_others_keys_takes_no_part(nodes: Nodes) -> None:
    config = nodes.contexts[3].node_config
    nodes.contexts[3].node_config = {k: v for k, v in config.items() if k != "peers"}
    with pytest.raises(PolicyRefused, match=r"PEERS in settings\.env"):
        nodes.ask(3, "train")
    nodes.contexts[3].node_config = config


def test_a_deployment_gives_every_node_the_others_public_keys(tmp_path: Path, tiny: Tiny) -> None:
    experiment = tiny(*BASE, SECURE)
    folder = tmp_path / "federation"
    write_folder(folder, Plan(4, ("localhost",)), experiment, ExperimentContext(experiment))
    for number in range(4):
        node = folder / f"node-{number}"
        keys = NodeKeys(node / "peers", 4)
        data = b"anything"
        other = (number + 1) % 4
        mark = signature_of(folder / f"node-{other}" / "node.key", data)
        assert keys.signed(other, data, mark)
        assert not keys.signed(number, data, mark)
        settings = read_settings(node / "settings.env")
        assert f'peers="{node / "peers"}"' in " ".join(arguments_of(settings, node))
    found = {finding.what: finding for finding in check_node(folder / "node-0")}
    assert found["peers"].state == found["policy"].state == "ok"
    (folder / "node-0" / "peers" / "node-2.pub").unlink()
    found = {finding.what: finding for finding in check_node(folder / "node-0")}
    assert found["peers"].state == "failed"
    assert "client 2 has none" in found["peers"].found


def test_sums_in_all_runs_on_the_same_images_share_a_nodes_budget(nodes: Nodes) -> None:
    """The owner allows epsilon 500 in all: that is what one run may cost, whatever it is called."""
    allowed = nodes.experiment.release.options["secure"]["repeats"] + 1
    answered = 0
    for run in ("r1", "r2"):
        for node in range(4):
            nodes.ask(node, "train", run=run)
        for attempt in range(100, 100 + allowed):
            roster = nodes.roster(attempt, run=run)
            try:
                nodes.vote(0, roster, run=run)
            except RuntimeError as error:
                assert "its budget is 500" in str(error)  # noqa: PT017
                break
            answered += 1
    ledgers = Path(nodes.contexts[0].node_config["state-dir"]) / "budgets"
    (book,) = ledgers.glob("*.jsonl")
    assert book.read_text().count('"reserve"') <= allowed
    assert answered < allowed
