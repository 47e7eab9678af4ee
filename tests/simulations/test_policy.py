"""A node whose server is hostile: it keeps its own terms, whatever the messages ask for."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from torch import Tensor

from fedkd.config import ConfigError, Experiment
from fedkd.data.local_shard import write_private, write_public
from fedkd.knowledge.kinds import Logits
from fedkd.privacy.accounting import Steps, epsilon
from fedkd.privacy.policy import (
    Policy,
    PolicyRefused,
    Promise,
    check_config,
    explained,
    load_policy,
)
from fedkd.rounds import ExperimentContext
from fedkd.simulations.client_app import make_client_app
from fedkd.simulations.deploy.folder import policy_text
from tests.conftest import Tiny

pytestmark = pytest.mark.usefixtures("lean")


Ask = Callable[..., RecordDict]
SMALL = (
    "teachers.models=[mlp]", "teachers.epochs=1", "student.model=mlp", "distillation.losses=[kd]",
    "fusion=[uniform]", "data.holdout=0.2",
)  # fmt: skip
PRIVATE = (
    *SMALL, "teachers.privacy={epsilon: 2.0, nominal_size: 40, delta: 0.001, accountant: rdp}",
    "evaluation.clients=false",
)  # fmt: skip


def node(
    tmp_path: Path, policy: Policy | None, data: str | None = None, root: str | None = None
) -> Ask:
    """`ask(kind, experiment, run=…, round=…, student=…)` of a real client app with this policy."""
    config: dict[str, Any] = {
        "partition-id": 0,
        "num-partitions": 3,
        "state-dir": str(tmp_path / "state"),
    }
    if policy is not None:
        (tmp_path / "policy.yaml").write_text(policy.to_yaml())
        config["policy"] = str(tmp_path / "policy.yaml")
    if data is not None and root is not None:
        config |= {"data": data, "data-root": root}
    context = Context(run_id=1, node_id=5, state=RecordDict(), run_config={}, node_config=config)
    TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1
    app = make_client_app()

    def ask(
        kind: str,
        experiment: Experiment,
        run: str = "r1",
        round: int = 1,
        student: dict[str, Tensor] | None = None,
        **job: Any,
    ) -> RecordDict:
        fingerprint = job.pop("fingerprint", None) or _transfer(experiment)
        content = RecordDict(
            {
                "job": ConfigRecord(
                    {
                        "config": experiment.to_bytes(), "run": run, "round": round, "state": "",
                        "fingerprint": fingerprint, **job,
                    }
                )
            }
        )  # fmt: skip
        if student is not None:
            content["student"] = ArrayRecord(student)
        message = Message(content, dst_node_id=5, message_type=kind, ttl=600, group_id="1")
        message.metadata.__dict__["_message_id"] = "x"
        return app(message, context).content

    return ask


def _transfer(experiment: Experiment) -> str:
    return ExperimentContext(experiment).data.transfer.fingerprint


def strictest(experiment: Experiment) -> Policy:
    space = ExperimentContext(experiment)
    return Policy.of(experiment, space.kinds, space.fusion, space.largest_network)


def test_the_default_policy_runs_its_experiment_and_nothing_else_is_sent(
    tmp_path: Path, tiny: Tiny
) -> None:
    experiment = tiny(*PRIVATE)
    ask = node(tmp_path, strictest(experiment))
    assert "describe" in ask("query.describe", experiment)
    for number in (1, 2):
        trained = ask("train", experiment, round=number)
        assert set(trained["metrics"]) == {"epsilon", "trained"}
        answer = ask("query.knowledge", experiment, round=number)
        assert set(answer["transfer.arrays"]) == {"logits"}
        assert not {"num_examples", "class_counts"} & set(answer["transfer.header"])
    files = [p for p in (tmp_path / "state").rglob("*") if p.is_file()]
    assert {p.stat().st_mode & 0o777 for p in files} == {0o600}
    assert {p.parent.stat().st_mode & 0o777 for p in files} == {0o700}


# What a hostile server sends -> the line of the policy that refuses it. Everything is refused
# before an image is read, so what it discloses is this line.
HOSTILE: dict[str, tuple[str, tuple[str, ...], str]] = {
    "the promise left out": ("train", (*SMALL, "evaluation.clients=false"), "promise.mechanism"),
    "labels protected only": (
        "train",
        (*PRIVATE, "teachers.privacy={mechanism: label_dp, epsilon: 2.0}"),
        "promise.mechanism",
    ),
    "noise of a hundredth": (
        "train",
        (*PRIVATE, "teachers.privacy={noise_multiplier: 0.01, nominal_size: 40, delta: 0.001}"),
        "promise.epsilon",
    ),
    "a delta as large as one image": (
        "train",
        (*PRIVATE, "teachers.privacy={epsilon: 2.0, nominal_size: 40, delta: 0.02}"),
        "promise.delta",
    ),
    "facts about the images": (
        "query.knowledge", (*PRIVATE, "distillation.losses=[kd, rkd]"), "disclose.kinds",
    ),
    "other data": ("train", (*PRIVATE, "data.dataset=digits"), "datasets"),
    "a network of a million layers": (
        "train", (*PRIVATE, "teachers.models=[{name: mlp, layers: 1000000}]"), "models",
    ),
    "a student of a million layers": (
        "train", (*PRIVATE, "student.model={name: mlp, layers: 1000000}"), "models",
    ),
    "a year of training": ("train", (*PRIVATE, "teachers.epochs=100000"), "limits.epochs"),
    "wrong labels": (
        "train", (*PRIVATE, "data.label_noise={kind: pair, rate: 0.5}"), "data.label_noise",
    ),
    "rounds without end": ("train", (*PRIVATE, "rounds=100000"), "limits.rounds"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_what_a_hostile_server_sends_is_refused_by_a_line_of_the_policy(
    tmp_path: Path, tiny: Tiny, name: str
) -> None:
    kind, overrides, line = HOSTILE[name]
    ask = node(tmp_path, strictest(tiny(*PRIVATE)))
    with pytest.raises(PolicyRefused, match=f"^{line}: "):
        ask(kind, tiny(*overrides), fingerprint="f")
    assert not list((tmp_path / "state").rglob("*.npz"))
    assert not list((tmp_path / "state").rglob("*.pt"))


def test_a_plugin_that_no_policy_names_is_not_imported(
    tmp_path: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hostile_plugin.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    policy = strictest(tiny(*PRIVATE))
    values = {**tiny(*PRIVATE).model_dump(mode="json"), "plugins": ["hostile_plugin"]}
    with pytest.raises(PolicyRefused, match=r"^plugins: the run asks for hostile_plugin"):
        node(tmp_path, policy)("train", Experiment.model_validate(values), fingerprint="f")


@pytest.mark.parametrize("run", ["..", ".", "", "a/b", "/tmp/x", "a\\b", "-x", "x" * 300, "a\n"])
def test_run_names_climb_nowhere(tmp_path: Path, tiny: Tiny, run: str) -> None:
    ask = node(tmp_path, strictest(tiny(*PRIVATE)))
    with pytest.raises(RuntimeError, match="no plain name"):
        ask("train", tiny(*PRIVATE), run=run, fingerprint="f")
    assert not (tmp_path / "state").exists()
    assert {p.name for p in tmp_path.iterdir()} == {"policy.yaml"}


def test_a_node_without_a_policy_does_nothing(tmp_path: Path, tiny: Tiny) -> None:
    with pytest.raises(PolicyRefused, match=r"no policy.*fedkd deploy policy"):
        node(tmp_path, None)("train", tiny(*SMALL), fingerprint="f")


def test_the_config_of_a_run_is_that_of_its_first_message(tmp_path: Path, tiny: Tiny) -> None:
    policy = strictest(tiny(*PRIVATE))
    ask = node(tmp_path, policy.model_copy(update={"promise": policy.promise.model_copy(
        update={"mechanism": "none"})}))  # fmt: skip
    ask("train", tiny(*PRIVATE))
    with pytest.raises(PolicyRefused, match="config of run r1 is not the one of its first"):
        ask("train", tiny(*PRIVATE, "distillation.epochs=3"), round=2)


def test_one_budget_over_all_runs_seeds_and_names(tmp_path: Path, tiny: Tiny) -> None:
    """Two rounds fit the budget; other runs find it spent, whatever seed or holdout they choose."""
    whole = ExperimentContext(tiny(*PRIVATE)).data
    write_public(whole, tmp_path / "public.npz", answers=False)
    write_private(whole, 0, tmp_path / "mine.npz")
    experiment = tiny(*PRIVATE, "data.public=public.npz")
    policy = Policy.of(experiment, (Logits(),), (), 10**6)
    allowed = policy.disclose.model_copy(update={"holdout": 0.5})
    ask = node(
        tmp_path, policy.model_copy(update={"disclose": allowed}),
        data=str(tmp_path / "mine.npz"), root=str(tmp_path),
    )  # fmt: skip
    here = {"fingerprint": whole.transfer.fingerprint}
    paid = [ask("train", experiment, round=n, **here)["metrics"]["trained"] for n in (1, 2, 3)]
    assert paid == [1, 1, 0]
    for run, change in (("r2", "rounds=2"), ("r3", "seed=1"), ("r4", "data.holdout=0.4")):
        other = tiny(*PRIVATE, "data.public=public.npz", change)
        with pytest.raises(RuntimeError, match="does not pay for a single round"):
            ask("train", other, run=run, **here)


RELEASE = "release={name: gnmax, epsilon: 4.0, delta: 0.001, min_votes: 3, cells: 6}"
RELEASED = (
    *SMALL, RELEASE, "evaluation.baselines=[oracle]",
    "distillation.losses=[ce]", "evaluation.clients=false", "evaluation.teachers=false",
)  # fmt: skip


def test_what_a_trusted_server_releases_counts_in_the_budget_of_all_runs(
    tmp_path: Path, tiny: Tiny
) -> None:
    experiment = tiny(*RELEASED)
    policy = strictest(experiment)
    assert policy.promise == Promise(mechanism="release", epsilon=4.0, delta=0.001)
    assert "trusts the server with its answers" in " ".join(explained(policy))
    ask = node(tmp_path, policy)
    for number in (1, 2):
        assert not ask("train", experiment, round=number)["metrics"]
    (path,) = (tmp_path / "state" / "budgets").glob("*.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    paid = [Steps(**line["reserve"]) for line in lines if "reserve" in line]
    assert epsilon(paid, 0.001, "gaussian") == pytest.approx(4.0, rel=1e-6)
    with pytest.raises(RuntimeError, match=r"promise\.epsilon: round 1 would bring .* epsilon"):
        ask("train", tiny(*RELEASED, "distillation.epochs=1"), run="r2")
    for change, line in (
        ("release=null", r"promise\.mechanism: .* under release, the run promises none"),
        (RELEASE.replace("4.0", "5.0"), r"promise\.epsilon: the run asks for 5\.0"),
        (RELEASE.replace("0.001", "0.01"), r"promise\.delta: the run asks for 0\.01"),
    ):
        with pytest.raises(RuntimeError, match=line):
            ask("train", tiny(*RELEASED, change), run="r3")


def test_randomised_labels_are_drawn_once_for_all_runs(tmp_path: Path, tiny: Tiny) -> None:
    overrides = (*SMALL, "teachers.privacy={mechanism: label_dp, epsilon: 1.0}")
    experiment = tiny(*overrides, "evaluation.clients=false")
    ask = node(tmp_path, strictest(experiment))
    for run in ("r1", "r2"):
        ask("train", experiment, run=run)
    (labels,) = (tmp_path / "state" / "budgets").glob("*-labels-1.pt")
    weights = [
        torch.load(tmp_path / "state" / run / "client-0000" / "teacher-0001.pt")["weights"]
        for run in ("r1", "r2")
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    # Another epsilon would be a second draw, and the two together cost more than is allowed.
    other = tiny(
        *SMALL, "teachers.privacy={mechanism: label_dp, epsilon: 0.9}", "evaluation.clients=false"
    )
    with pytest.raises(Exception, match="budget is 1"):
        ask("train", other, run="r3")
    assert labels.is_file()


def test_a_ledger_that_forgets_a_teacher_is_not_used(tmp_path: Path, tiny: Tiny) -> None:
    experiment = tiny(*PRIVATE)
    ask = node(tmp_path, strictest(experiment))
    ask("train", experiment)
    for file in (tmp_path / "state" / "r1" / "client-0000").glob("privacy.*"):
        file.unlink()
    with pytest.raises(RuntimeError, match="does not know of the teacher teacher-0001"):
        ask("train", experiment, round=2)


def test_a_delta_not_below_one_over_the_true_size_is_refused_without_telling_it(
    tmp_path: Path, tiny: Tiny
) -> None:
    small = "teachers.privacy={epsilon: 2.0, nominal_size: 4, delta: 0.2}"
    experiment = tiny(*PRIVATE, small)
    held = len(ExperimentContext(experiment).data.shard(0))
    assert held > 5
    with pytest.raises(PolicyRefused, match="this node's log says why") as refusal:
        node(tmp_path, strictest(experiment))("train", experiment)
    assert str(held) not in str(refusal.value)


def _detector(image: Tensor, label: int, bias: float, experiment: Experiment) -> dict[str, Tensor]:
    """A student whose one hidden unit fires on one image: the membership oracle of a red team."""
    data = ExperimentContext(experiment).data
    z = (image.double() / 255 - data.mean[0]) / data.std[0]
    classes = len(data.classes)
    other = (label + 1) % classes
    weights = {
        "mean": torch.tensor(data.mean).view(1, -1, 1, 1).float(),
        "std": torch.tensor(data.std).view(1, -1, 1, 1).float(),
    }
    weight = torch.zeros(classes, 1)
    weight[label], weight[other] = 1000.0, 0.0
    last = torch.zeros(classes)
    last[other] = 1.0
    flat = z.flatten()
    return {
        **weights,
        "first": (flat / flat.square().sum()).float()[None],
        "first bias": torch.tensor([bias]),
        "last": weight,
        "last bias": last,
    }


def _as_student(parts: dict[str, Tensor], experiment: Experiment) -> dict[str, Tensor]:
    from fedkd.build import build_network

    space = ExperimentContext(experiment)
    network = build_network(experiment, experiment.student.model, space.data, "student")
    state = {k: v.clone() for k, v in network.state_dict().items()}
    linear = [k for k in state if k.endswith("weight")]
    for name, part in zip(linear, ("first", "last")):
        state[name] = parts[part].reshape(state[name].shape)
        state[name.replace("weight", "bias")] = parts[f"{part} bias"]
    return state


ORACLE = ("student.model={name: mlp, layers: 1, hidden: 1}", "data.holdout=0.98")


def test_the_membership_oracle_learns_nothing(tmp_path: Path, tiny: Tiny) -> None:
    """A student that fires on one image, sent with `evaluate`: is the image held?

    Against a config that lets students be judged it tells members exactly; a node under a promise
    answers no such question, and one without a promise answers about one student only.
    """
    from fedkd.training.evaluation import predict

    # The attack works: the very students tell members from others on the images themselves.
    open_config = tiny(*SMALL, *ORACLE)
    data = ExperimentContext(open_config).data
    held = data.holdout(0)
    other = data.holdout(1)

    def hits(state: dict[str, Tensor]) -> int:
        from fedkd.build import build_network

        network = build_network(open_config, open_config.student.model, data, "student")
        network.load_state_dict(state)
        return int((predict(network, held.images).argmax(1) == held.labels).sum())

    def answered(image: Tensor, label: int) -> int:
        on, off = (
            _as_student(_detector(image, label, bias, open_config), open_config)
            for bias in (-0.96, -1.5)
        )
        return hits(on) - hits(off)

    members = [answered(held.images[i], int(held.labels[i])) for i in range(8)]
    others = [answered(other.images[i], int(other.labels[i])) for i in range(8)]
    assert members == [1] * 8
    assert others == [0] * 8

    # Under a promise the node never judges, whatever the message carries.
    private = tiny(*PRIVATE, *ORACLE)
    (tmp_path / "a").mkdir()
    ask = node(tmp_path / "a", strictest(private))
    ask("train", private)
    student = _as_student(_detector(held.images[0], int(held.labels[0]), -0.96, private), private)
    with pytest.raises(PolicyRefused, match="asked to judge a student on private images"):
        ask("evaluate", private, student=student)

    # Without one, a student per run, and no more images than the owner allows.
    (tmp_path / "b").mkdir()
    ask = node(tmp_path / "b", strictest(open_config))
    ask("train", open_config)
    image, label = held.images[0], int(held.labels[0])
    on, off = (
        _as_student(_detector(image, label, bias, open_config), open_config)
        for bias in (-0.96, -1.5)
    )
    first = ask("evaluate", open_config, student=on)["metrics"]
    assert ask("evaluate", open_config, student=on)["metrics"] == first  # asked again after a loss
    with pytest.raises(PolicyRefused, match="a student of this run was judged already"):
        ask("evaluate", open_config, student=off)
    with pytest.raises(PolicyRefused, match=r"^disclose.holdout: the run asks for 0.98"):
        check_config(strictest(tiny(*SMALL)), open_config.model_copy(
            update={"student": tiny(*SMALL).student}))  # fmt: skip


def test_a_server_that_names_a_folder_gets_nothing_written_there(
    tmp_path: Path, tiny: Tiny
) -> None:
    (tmp_path / "here").mkdir()
    context = Context(
        run_id=1, node_id=5, state=RecordDict(), run_config={},
        node_config={"partition-id": 0, "num-partitions": 3},
    )  # fmt: skip
    TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1
    job = {
        "config": tiny(*SMALL).to_bytes(), "run": "r", "round": 1,
        "state": str(tmp_path / "here"), "fingerprint": "f",
    }  # fmt: skip
    message = Message(
        RecordDict({"job": ConfigRecord(job)}), dst_node_id=5, message_type="train", ttl=600
    )
    message.metadata.__dict__["_message_id"] = "x"
    with pytest.raises(RuntimeError, match="nowhere to keep its teacher"):
        make_client_app()(message, context)
    assert not list((tmp_path / "here").iterdir())


def test_work_has_limits(tmp_path: Path, tiny: Tiny) -> None:
    experiment = tiny(*SMALL, "teachers.epochs=3")
    policy = strictest(experiment)

    def limited(**limits: float) -> Ask:
        changed = policy.limits.model_copy(update=limits)
        return node(tmp_path, policy.model_copy(update={"limits": changed}))

    with pytest.raises(PolicyRefused, match=r"^limits.parameters: the run asks for"):
        limited(parameters=10)("train", experiment)
    with pytest.raises(RuntimeError, match="longer than its time limit"):
        limited(seconds=1e-9)("train", experiment)
    ask = limited()
    ask("train", experiment)
    with pytest.raises(PolicyRefused, match=r"^limits.payload_mb: 0.0 MB, this node allows 1e-06"):
        limited(payload_mb=1e-6)("query.knowledge", experiment)
    with pytest.raises(PolicyRefused, match=r"^limits.disk_mb: 0 MB are used"):
        limited(disk_mb=1e-6)("train", experiment, round=2)


def test_the_policy_file_is_checked_and_explained(tmp_path: Path, tiny: Tiny) -> None:
    experiment = tiny(*PRIVATE)
    file = tmp_path / "policy.yaml"
    file.write_text(policy_text(experiment, ExperimentContext(experiment)))
    policy = load_policy(file)
    assert policy == strictest(experiment)
    text = "\n".join(explained(policy))
    assert "trains under dp_sgd or stronger: epsilon 2, delta 0.001 over all runs" in text
    assert "tells the server: logits" in text
    file.write_text(yaml.safe_dump({"disclose": {"kind": ["logits"]}}))
    with pytest.raises(ConfigError, match="did you mean 'kinds'"):
        load_policy(file)
    assert policy.limits.epochs == experiment.teachers.epochs
