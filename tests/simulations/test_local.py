"""The whole job in one process: what a run leaves, repeats, survives and resumes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedkd.config import ConfigError, Experiment
from fedkd.io.tensors import load_state
from fedkd.knowledge.kinds import Logits
from fedkd.knowledge.query import Images
from fedkd.reporting.page import render
from fedkd.reporting.run_page import make_page
from fedkd.reporting.run_record import Found
from fedkd.rounds import ExperimentContext
from fedkd.runs.directory import RunDirectory
from fedkd.runs.events import (
    AssistantEpochFinished,
    EpochFinished,
    Event,
    ReplyRefused,
    RoundFinished,
)
from fedkd.simulations.local import run_local
from tests.conftest import Shared, Tiny
from tests.simulations.faults import BAD_PAYLOADS, crashing, tampering

pytestmark = pytest.mark.usefixtures("lean")


def student(run: RunDirectory) -> str:
    return str(run.read_json("summary.json")["hash"])


@pytest.mark.smoke
def test_a_run_leaves_everything_behind(tiny: Tiny) -> None:
    run = run_local(tiny("distillation.epochs=20", "evaluation.baselines=[oracle, ceiling]"))
    names = {path.name for path in run.path.iterdir()}
    assert names >= {
        "config.yaml", "versions.json", "metrics.jsonl", "ledger.jsonl", "summary.json",
        "checkpoints", "knowledge", "clients",
    }  # fmt: skip
    summary = run.read_json("summary.json")
    assert summary["rounds"] == 2
    assert summary["student"]["accuracy"] > 0.5  # chance is 0.25
    assert len(summary["teachers"]) == 3
    assert 0 < summary["oracle"] <= 1
    assert 0 < summary["ceiling"] <= 1
    assert json.loads((run.path / "versions.json").read_text())["torch"] == torch.__version__
    ledger = run.messages()
    phases = {(entry.round, entry.phase, entry.client) for entry in ledger}
    assert {
        (r, p, c) for r in (1, 2) for p in ("train", "knowledge", "evaluate") for c in range(3)
    } <= phases
    # Two kinds of 48 x 4 half-precision logits are 768 bytes; headers add some hundreds.
    sizes = [entry.up for entry in ledger if entry.phase == "knowledge"]
    assert all(768 < size < 768 + 2500 for size in sizes)


def test_same_seed_same_student_other_seed_another(tiny: Tiny, shared: Shared) -> None:
    first, again, other = shared(), run_local(tiny()), run_local(tiny("seed=1"))
    assert student(first) == student(again) != student(other)


@pytest.mark.parametrize("finished", [1, 2])
def test_a_resumed_run_reaches_the_same_student(tiny: Tiny, shared: Shared, finished: int) -> None:
    whole = shared("rounds=3")

    class Stop(Exception):
        pass

    def stop(event: str, **facts: object) -> None:
        if event == "phase" and facts["round"] == finished + 1 and facts["phase"] == "distil":
            raise Stop  # after the knowledge of the next round was accepted

    run = RunDirectory.new(tiny("rounds=3"))
    with pytest.raises(Stop):
        run_local(run.experiment, run=run, notify=stop)
    assert run.load_checkpoint()["round"] == finished
    resumed = run_local(run.experiment, run=RunDirectory.open(run.path))
    assert student(resumed) == student(whole)
    rounds = [record.round for record in resumed.events(RoundFinished)]
    assert rounds == [1, 2, 3]
    assert [r.hash for r in resumed.events(RoundFinished)] == [
        r.hash for r in whole.events(RoundFinished)
    ]


def test_state_files_hold_no_code(shared: Shared, tmp_path: Path) -> None:
    for path in shared().path.rglob("*.pt"):
        load_state(path)  # weights_only=True inside
    evil = tmp_path / "evil.pt"
    torch.save({"weights": Path("/")}, evil)
    with pytest.raises(RuntimeError, match="cannot read"):
        load_state(evil)


@pytest.mark.parametrize("name", BAD_PAYLOADS)
def test_a_bad_payload_costs_its_client_the_round_and_nobody_else(tiny: Tiny, name: str) -> None:
    tamper, reason = BAD_PAYLOADS[name]
    run = run_local(tiny("federation.codec=float32"), client_app=tampering({1: tamper}))
    refused = run.events(ReplyRefused)
    assert [(r.round, r.client, r.phase) for r in refused] == [
        (1, 1, "knowledge"),
        (2, 1, "knowledge"),
    ]
    assert all(reason in r.reason for r in refused)
    assert [r.answered for r in run.events(RoundFinished)] == [[0, 2], [0, 2]]


def test_who_has_a_say_stands_in_the_metrics_and_on_the_page(tiny: Tiny) -> None:
    def lie(arrays: dict[str, np.ndarray], header: dict[str, Any]) -> None:
        arrays["logits"][:] = [9, 0, 0, 0]

    run = run_local(
        tiny("fusion=consensus", "federation.codec=float32", "teachers.epochs=20",
             "data.partition.alpha=100", "distillation.losses=[kd]", "clients=4"),
        client_app=tampering({1: lie}),
    )  # fmt: skip
    for record in run.events(RoundFinished):
        assert record.weights == pytest.approx({0: 1 / 3, 1: 0, 2: 1 / 3, 3: 1 / 3})
    assert render(make_page(Found(run))).count("33.3 %") >= 3
    merged = run_local(tiny("fusion=median", "rounds=1", "distillation.losses=[kd]"))
    assert not merged.events(RoundFinished)[0].weights


@pytest.mark.parametrize("message_type", ["train", "query.knowledge", "evaluate"])
def test_a_client_that_raises_loses_its_round_only(tiny: Tiny, message_type: str) -> None:
    run = run_local(tiny(), client_app=crashing(2, message_type, 1))
    refused = run.events(ReplyRefused)
    assert [(r.round, r.client) for r in refused] == [(1, 2)]
    assert "the disk is full" in refused[0].reason
    lost = [] if message_type == "evaluate" else [2]
    assert run.events(RoundFinished)[0].answered == [c for c in range(3) if c not in lost]
    assert run.events(RoundFinished)[1].answered == [0, 1, 2]


def test_below_quorum_the_student_is_kept_and_the_round_is_degraded(tiny: Tiny) -> None:
    tampers = {client: BAD_PAYLOADS["nan"][0] for client in (0, 1)}
    run = run_local(tiny("federation.quorum=0.6"), client_app=tampering(tampers))
    rounds = run.events(RoundFinished)
    assert [r.status for r in rounds] == ["degraded", "degraded"]
    assert rounds[0].hash == rounds[1].hash
    assert run.read_json("summary.json")["degraded_rounds"] == [1, 2]


@pytest.mark.parametrize("nodes", [2, 5])
def test_a_federation_of_another_size_is_refused_by_name(
    tiny: Tiny, nodes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedkd.strategies.nodes.SETTLE_SECONDS", 0.2)
    with pytest.raises(
        ConfigError, match=f"the experiment has 3 clients, the federation has {nodes}"
    ):
        run_local(tiny(), nodes=nodes)


def test_a_client_with_another_transfer_set_is_refused_by_name(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fedkd.simulations.client_app as module

    real = module.experiment_context

    def other(experiment: Experiment, *place: Any) -> ExperimentContext:
        return real(experiment.model_copy(update={"seed": 7}), *place)

    monkeypatch.setattr(module, "experiment_context", other)
    with pytest.raises(ConfigError, match="no client of the federation can take part"):
        run_local(tiny())


@pytest.mark.parametrize(
    "words",
    [
        ["teachers.feedback.use=regulariser"],
        ["teachers.feedback.use=init", "teachers.models=[{name: cnn_tiny, norm: batch}, mlp]"],
        ["data.transfer.labelled=true", "distillation.losses=[kd]"],
        ["data.views.refresh=false", "distillation.warm_start=false", "teachers.warm_start=false"],
        ["evaluation.teachers=false", "evaluation.clients=false", "evaluation.baselines=[]"],
        ["distillation.losses=[ce]", "fusion=[sample_count]"],
        ["data.transfer.dataset={name: digits}", "data.transfer.size=40"],
        ["teachers.augment=crop", "distillation.optimizer.schedule=step"],
        ["data.validation=10", "data.partition=iid", "data.private=60"],
    ],
    ids=lambda words: words[0],
)
def test_every_option_runs(tiny: Tiny, words: list[str]) -> None:
    run = run_local(tiny(*words))
    assert run.events(ReplyRefused) == []
    assert run.read_json("summary.json")["rounds"] == 2


def test_feedback_reaches_the_clients(tiny: Tiny, shared: Shared) -> None:
    plain, pulled = shared(), run_local(tiny("teachers.feedback.use=regulariser"))
    assert student(plain) != student(pulled)
    down = [
        {e.round: e.down for e in run.messages() if e.phase == "train"} for run in (plain, pulled)
    ]
    assert down[1][2] > down[1][1]  # the student travels from round 2 on
    assert down[0][2] == pytest.approx(down[0][1], abs=8)


@pytest.mark.parametrize("assistant_mode", ["takd", "dgkd"])
def test_assistants_on_the_server_survive_a_restart(tiny: Tiny, assistant_mode: str) -> None:
    words = (
        "distillation.assistants=[{name: cnn_tiny, width: 24}, {name: cnn_tiny, width: 20}]",
        f"distillation.assistant_mode={assistant_mode}",
        "distillation.losses=[dkd, fitnet]",
        "teachers.models=[cnn_tiny]",
    )
    whole = run_local(tiny(*words))
    assert {type(e) for e in whole.events(Event)} >= {AssistantEpochFinished, EpochFinished}
    first = run_local(tiny("rounds=1", *words))
    longer = first.experiment.model_copy(update={"rounds": 2})
    resumed = run_local(longer, run=RunDirectory(first.path, longer, first.identity))
    assert resumed.events(RoundFinished)[-1].hash == whole.events(RoundFinished)[-1].hash


FEATURES = "distillation.losses=[dkd, cat, wkd_f, wkd_l, {name: fitnet, stage: 1}]"


def test_features_of_different_networks_travel_and_teach(tiny: Tiny) -> None:
    run = run_local(tiny(FEATURES, "teachers.models=[cnn_tiny, cnn_small]"))
    assert not run.events(ReplyRefused)
    assert set(run.events(EpochFinished)[-1].terms) == {"dkd", "cat", "wkd_f", "wkd_l", "fitnet"}
    sizes = {e.client: e.up for e in run.messages() if e.phase == "knowledge"}
    # Half-precision numbers per image: logits, class maps, statistics, the map after stage 1; and
    # once the class costs. cnn_tiny has 24 channels of 4x4 there, cnn_small 32, and 48 at the end.
    for client, channels, last in ((0, 24, 24), (1, 32, 48)):
        numbers = 48 * (4 + 4 * 4 + 2 * last + channels * 4 * 4) + 4 * 4
        assert 2 * numbers < sizes[client] < 2 * numbers + 5000


def test_a_network_that_cannot_share_what_a_loss_needs_is_refused_by_name(tiny: Tiny) -> None:
    with pytest.raises(
        ConfigError, match=r"teachers\.models\.0: 'mlp': .*class_maps.*no feature map"
    ):
        run_local(tiny("distillation.losses=[dkd, cat]"))
    with pytest.raises(ConfigError, match=r"student\.model: 'mlp': .*class_maps"):
        run_local(
            tiny(
                "distillation.losses=[dkd, cat]", "teachers.models=[cnn_tiny]", "student.model=mlp"
            )
        )


def test_a_payload_with_another_networks_shape_is_refused(tiny: Tiny) -> None:
    def wider(arrays: dict[str, np.ndarray], _header: dict[str, object]) -> None:
        name = next(name for name in arrays if name.startswith("feature_statistics"))
        arrays[name] = np.repeat(arrays[name], 2, axis=2)

    words = ("distillation.losses=[dkd, wkd_f]", "teachers.models=[cnn_tiny]")
    run = run_local(tiny(*words), client_app=tampering({1: wider}))
    reasons = [r.reason for r in run.events(ReplyRefused)]
    assert len(reasons) == 2
    assert all("shape (48, 2, 48, 1, 1), expected (48, 2, 24, 1, 1)" in r for r in reasons)


def test_teachers_answer_the_servers_labelled_images_if_a_rule_asks(tiny: Tiny) -> None:
    run = run_local(tiny("fusion=[learned_gate]", "data.validation=30", "rounds=1"))
    assert run.knowledge(1, Images.VALIDATION).clients() == [0, 1, 2]
    bank = run.knowledge(1, Images.VALIDATION).bank((Logits(),))
    assert bank.num_samples == 30
    assert run.events(ReplyRefused) == []
