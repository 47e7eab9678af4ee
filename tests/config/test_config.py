"""Configs: what is accepted, and that every mistake is one helpful line."""

import inspect
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import fedkd
from fedkd.build import build_optimizer, check, mirrored
from fedkd.config import (
    ConfigError,
    Evaluation,
    load_experiment,
    make_experiment,
    parse_yaml,
    read_experiment,
)
from fedkd.distillation.objective import Term
from fedkd.losses import LOSSES
from fedkd.rounds.context import ExperimentContext

# Studies, in folders of their own, are tested in test_central.py.
CONFIGS = [
    path
    for folder in ("configs", "configs/bytes")
    for path in sorted((Path(__file__).parents[2] / folder).glob("*.yaml"))
]


@pytest.mark.smoke
@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_shipped_config_is_valid(path: Path) -> None:
    experiment = load_experiment(path)
    check(experiment)
    assert mirrored(experiment) == []


def test_what_mirrors_digits_is_named_with_its_remedy() -> None:
    wrong = make_experiment({}, ["teachers.augment=crop_flip", "data.views.flip=true"])
    assert [line.split(":")[0] for line in mirrored(wrong)] == [
        "teachers.augment",
        "data.views.flip",
    ]
    assert "data set 'digits'" in mirrored(wrong)[0]
    assert mirrored(wrong)[1].endswith("; set data.views.flip=false")
    assert mirrored(make_experiment({}, [])) == []


@pytest.mark.smoke
def test_resolved_config_reads_back_as_itself() -> None:
    experiment = make_experiment({"fusion": ["entropy"]}, ["distillation.losses=[kd]"])
    assert make_experiment(yaml.safe_load(experiment.to_yaml())) == experiment
    assert make_experiment(parse_yaml(experiment.to_json(), "json")) == experiment


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("distillation.guidance=next", "distillation.guidance: is called assistant_mode (takd"),
        ("distillation.ema=0.9", "distillation.ema: is gone, since it made no student better"),
        ("student.pretraining={epochs: 1}", "student.pretraining: is gone"),
        ("rouns=3", "rouns: unknown key; did you mean 'rounds'?"),
        ("data.transfr.size=3", "data.transfr: unknown key; did you mean 'transfer'?"),
        ("data.transfer.sizes=3", "data.transfer.sizes: unknown key; did you mean 'size'?"),
        ("rounds=fast", "rounds: input should be a valid integer"),
        ("rounds=0", "rounds: input should be greater than or equal to 1, got 0"),
        ("teachers.optimizer.name=adm", "expected 'sgd', 'adam' or 'adamw', got 'adm'; did you"),
        ("rounds", "expected key=value"),
        ("federation.quorum=2", "federation.quorum: input should be less than or equal to 1"),
        ("distillation.optimizer.lr=.inf", "distillation.optimizer.lr: input should be a finite"),
        ("teachers.models=[]", "teachers.models"),
        ("name=../../etc", "name: string should match pattern"),
        ("plugins=[no_such_module_xyz]", "plugins: cannot import 'no_such_module_xyz'"),
        ("data.dataset=digts", "data.dataset: unknown data set 'digts'; did you mean 'digits'?"),
        ("student.model=resnet2", "student.model: unknown model 'resnet2'; did you mean 'resnet"),
        ("student.model=torchvision/resnet19", "did you mean 'torchvision/resnet18'?"),
        ("student.model={name: resnet20, deep: 3}", "model 'resnet20' has no option 'deep'"),
        ("fusion=[unifrom]", "fusion.0: unknown fusion 'unifrom'; did you mean 'uniform'?"),
        ("fusion=[{name: entropy, temperature: -1}]", "fusion.0: fusion 'entropy': temperature"),
        ("distillation.losses=[dkdd]", "distillation.losses.0: unknown loss 'dkdd'; did you mean"),
        (
            "distillation.losses=[{name: dkd, bata: 2}]",
            "has no option 'bata'; did you mean 'beta'?",
        ),
        ("distillation.losses=[{name: dkd, beta: x}]", "loss 'dkd': beta: Input should be a valid"),
        ("distillation.losses=[{name: dkd, weigth: 2}]", "did you mean 'weight'?"),
        (
            "data.partition={name: dirichlet, alfa: 1}",
            "has no option 'alfa'; did you mean 'alpha'?",
        ),
        ("teachers.augment=cropflip", "unknown augmentation 'cropflip'; did you mean 'crop_flip'?"),
        ("distillation.augment=crp", "distillation.augment: unknown augmentation 'crp'"),
        ("resources.device=cuda:99", "resources.device: 'cuda:99' is not usable here"),
    ],
)
def test_a_mistake_is_one_line_that_helps(word: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check(make_experiment({}, [word]))
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_overrides_reach_lists_components_and_defaults() -> None:
    experiment = make_experiment(
        {"teachers": {"models": ["mlp", "resnet8"]}},
        [
            "teachers.models.1.norm=batch",
            "data.partition.alpha=0.1",
            "distillation.optimizer.lr=1e-3",
            "student.model=resnet20",
        ],
    )
    assert experiment.teachers.models[1].options == {"norm": "batch"}
    assert experiment.data.partition.options["alpha"] == 0.1
    assert experiment.distillation.optimizer.lr == 1e-3
    assert experiment.student.model.name == "resnet20"


def test_naming_another_component_drops_the_old_ones_options() -> None:
    experiment = make_experiment({}, ["data.partition.name=iid"])
    assert experiment.data.partition.options == {}


def test_yaml_traps_are_closed(tmp_path: Path) -> None:
    assert parse_yaml("lr: 1e-4", "x") == {"lr": 1e-4}
    with pytest.raises(ConfigError, match=r"key 'rounds' is given twice \(line 2\)"):
        parse_yaml("rounds: 1\nrounds: 2", "x")
    with pytest.raises(ConfigError, match=r"x, line 1"):
        parse_yaml("a: b: c", "x")
    with pytest.raises(ConfigError):
        parse_yaml("!!python/object/apply:os.system [id]", "x")


def test_a_missing_config_names_the_nearest_shipped_one() -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'configs/quickstart\.yaml'"):
        load_experiment("configs/quickstrat.yaml")


def test_student_as_init_needs_a_teacher_of_its_model() -> None:
    with pytest.raises(ConfigError, match="needs a teacher of the student's model 'resnet20'"):
        make_experiment({}, ["teachers.feedback.use=init", "student.model=resnet20"])


# -- the recipe --------------------------------------------------------------------------------


@pytest.mark.smoke
def test_an_empty_config_and_the_python_api_are_one_recipe() -> None:
    from fedkd.api import train_student, train_teacher
    from fedkd.distillation.trainer import distill
    from fedkd.training.optimizers import DEFAULT_OPTIMIZER, RATES, Optimizer

    empty = make_experiment({})
    assert make_experiment({"clients": 8}) == empty
    teacher = {k: p.default for k, p in inspect.signature(train_teacher).parameters.items()}
    student = {k: p.default for k, p in inspect.signature(train_student).parameters.items()}
    for key in ("epochs", "batch_size", "augment"):
        assert teacher[key] == getattr(empty.teachers, key)
    for key in ("epochs", "batch_size"):
        assert student[key] == getattr(empty.distillation, key)
    assert inspect.signature(distill).parameters["epochs"].default == empty.distillation.epochs
    for key in ("strength", "flip"):
        assert student[key] == getattr(empty.data.views, key)
    assert empty.teachers.optimizer == empty.distillation.optimizer
    for name, rates in RATES.items():
        assert Optimizer(name=name).rates == rates
        assert (
            build_optimizer(
                make_experiment({"teachers": {"optimizer": {"name": name}}}).teachers.optimizer
            ).rates
            == rates
        )
    built = build_optimizer(empty.teachers.optimizer)
    assert replace(built, lr=None, weight_decay=None) == DEFAULT_OPTIMIZER
    assert [rule.name for rule in empty.fusion] == ["density_ratio"]


def test_the_python_api_without_losses_and_fusion_takes_those_of_an_empty_config() -> None:
    train, test = fedkd.load_dataset("synthetic", size=8, per_class=40)
    data = fedkd.federate(
        train, test, clients=2, partition="iid", transfer_size=32, transfer_labelled=False, seed=0
    )
    transfer, shards = data.transfer.images, [data.shard(client) for client in range(2)]
    teachers = [fedkd.network("mlp", transfer, seed=number) for number in range(2)]

    def weights(**given: Any) -> torch.Tensor:
        student = fedkd.train_student("mlp", teachers, transfer, epochs=1, seed=3, **given)
        return torch.cat([p.detach().flatten() for p in student.parameters()])

    written = [
        Term("ce", LOSSES.create("ce")),
        Term("dkd", LOSSES.create("dkd", alpha=1.0, beta=0.5, temperature=1.0)),
        Term("vrm", LOSSES.create("vrm"), weight=0.5),
    ]
    assert torch.equal(
        weights(shards=shards), weights(shards=shards, losses=written, fusion=["density_ratio"])
    )
    # Nothing shows who knows what: all teachers count alike, with a warning.
    with pytest.MonkeyPatch.context() as patch:
        warned: list[str] = []
        patch.setattr("fedkd.api.logger.warning", lambda text, *rest: warned.append(text % rest))
        assert torch.equal(weights(), weights(fusion=["uniform"]))
    assert len(warned) == 1
    assert "without shards all 2 teachers count the same" in warned[0]


PROMISES: list[dict[str, Any]] = [
    {"teachers": {"privacy": {"epsilon": 8, "nominal_size": 100}}},
    {"teachers": {"privacy": {"mechanism": "label_dp", "epsilon": 2}}},
    {"clients": 60, "data": {"partition": "iid"}, "release": {"name": "gnmax", "epsilon": 10}},
    {"clients": 60, "data": {"partition": "iid"}, "release": {"name": "prob_sum", "epsilon": 10}},
]


@pytest.mark.parametrize("values", PROMISES, ids=["dp_sgd", "label_dp", "gnmax", "prob_sum"])
def test_no_default_is_refused_under_a_promise(values: dict[str, Any]) -> None:
    experiment = make_experiment(values)
    check(experiment)
    ExperimentContext(experiment)  # refuses what leaks
    assert [rule.name for rule in experiment.fusion] == ["uniform"]
    assert [term.name for term in experiment.distillation.losses] == ["ce"]
    assert experiment.evaluation.baselines == ("oracle",)
    assert not experiment.evaluation.clients
    assert experiment.evaluation.teachers == ("release" not in values)
    assert set(experiment.settled) >= {"fusion", "distillation.losses", "evaluation.clients"}
    assert "fusion" not in make_experiment(values, ["fusion=[uniform]"]).settled
    # The same by words, and what travels reads back as itself.
    words = [f"{key}={json.dumps(value)}" for key, value in values.items()]
    assert make_experiment({}, words) == experiment
    assert read_experiment(experiment.to_bytes()) == experiment
    assert make_experiment(yaml.safe_load(experiment.to_yaml())) == experiment
    # Settled for this config alone, not in the defaults that all configs share.
    assert make_experiment({}).evaluation == Evaluation()
    assert [rule.name for rule in make_experiment({}).fusion] == ["density_ratio"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("fusion=[density_ratio]", "fusion: "),
        ("fusion=[class_gated]", "fusion: "),
        ("evaluation.clients=true", "evaluation.clients: must be false"),
        ("evaluation.baselines=[ceiling]", "evaluation.baselines: "),
    ],
)
@pytest.mark.parametrize("values", [PROMISES[0], PROMISES[2]], ids=["dp_sgd", "gnmax"])
def test_what_is_written_is_still_refused_under_a_promise(
    values: dict[str, Any], given: str, expected: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(expected)):
        ExperimentContext(make_experiment(values, [given]))


@pytest.mark.parametrize("name", ["gnmax", "confident_gnmax", "prob_sum"])
def test_too_few_clients_for_a_release_are_refused_before_a_round(name: str) -> None:
    experiment = make_experiment({"clients": 3, "release": {"name": name, "epsilon": 10}})
    with pytest.raises(ConfigError, match=r"clients: 3 are too few for release .* needs 50"):
        check(experiment)


def test_public_data_leave_no_ceiling_to_train() -> None:
    experiment = make_experiment({"data": {"public": "public.npz"}})
    assert experiment.evaluation.baselines == ("oracle",)
    with pytest.raises(ConfigError, match=r"evaluation\.baselines: 'ceiling' trains on"):
        make_experiment({}, ["data.public=p.npz", "evaluation.baselines=[ceiling]"])


def test_rates_go_with_the_name_of_the_optimiser() -> None:
    def rates(values: dict[str, Any], *words: str) -> tuple[str, float, float]:
        experiment = make_experiment({"teachers": {"optimizer": values}}, words)
        assert read_experiment(experiment.to_bytes()) == experiment
        made = experiment.teachers.optimizer
        return made.name, made.lr, made.weight_decay

    assert rates({}) == ("adamw", 0.003, 0.01)
    assert rates({"lr": 0.001}) == ("adamw", 0.001, 0.01)
    assert rates({"name": "sgd"}) == ("sgd", 0.05, 5e-4)
    assert rates({"name": "sgd", "lr": 0.003}) == ("sgd", 0.003, 5e-4)
    assert rates({"name": "adam"}) == ("adam", 0.003, 0.0)
    # Another optimiser: the options of the old one do not apply to it.
    assert rates({"lr": 0.001}, "teachers.optimizer.name=sgd") == ("sgd", 0.05, 5e-4)
    assert rates({}, "teachers.optimizer.lr=0.01") == ("adamw", 0.01, 0.01)
    with pytest.raises(ConfigError, match=r"teachers\.optimizer\.name: expected 'sgd'"):
        make_experiment({"teachers": {"optimizer": {"name": "adm"}}})


def test_what_travels_is_json_without_aliases() -> None:
    import zlib

    text = b"name: &a tiny\nplugins: [*a]"
    with pytest.raises(ConfigError, match="the server's config cannot be read"):
        read_experiment(b"\0" * 8 + zlib.compress(text))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_experiment(b"\0" * 8 + zlib.compress(b"[" * 100_000))


def test_a_nul_character_is_named_by_its_key() -> None:
    for values, key in (({"output": "a\0b"}, "output"), ({"plugins": ["x", "a\0"]}, "plugins.1")):
        with pytest.raises(ConfigError, match=f"{key}: holds a NUL character"):
            make_experiment(values)


@pytest.mark.parametrize(
    ("clients", "most", "start"),
    [(4, 4, None), ("4", 4, None), ("2 to 5", 5, 2), ({"min": 2, "max": 5}, 5, 2),
     ("2 or more", 10_000, 2), ({"min": 3}, 10_000, 3)],
)  # fmt: skip
def test_clients_may_be_a_range(clients: Any, most: int, start: int | None) -> None:
    experiment = make_experiment({"clients": clients, "federation": {"participation": 0.5}})
    participation = experiment.federation.participation
    assert (experiment.clients, participation.start, participation.ask) == (most, start, 0.5)
    assert read_experiment(experiment.to_bytes()) == experiment


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["clients=two"], "clients: expected a number, or a range like '2 to 5', '2 or more' or"),
        (["clients=5 to 2"], "federation.participation.start: 5 are more than clients=2"),
        (["federation.participation=1.5"], "participation.ask: expected all, a share like 0.4 or"),
        (["federation.participation=0"], "participation.ask: expected all, a share like 0.4 or"),
        (["federation.participation.minimum=9"], "minimum: 9 are more than clients=8"),
        (["federation.participation.sampler=unifrom"], "did you mean 'uniform'?"),
        (["federation.participation.sampler=schedule"], "'schedule' needs option 'cohorts'"),
    ],
)
def test_a_wrong_participation_is_one_line(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        check(make_experiment({}, words))
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("words", "together"),
    [
        ([], False),
        (["resources.client_gpus=0.5"], True),
        (["resources.batch_clients=on"], True),
        (["resources.client_gpus=1", "resources.batch_clients=off"], False),
    ],
)
def test_who_trains_together_follows_from_the_config(words: list[str], together: bool) -> None:
    assert make_experiment({}, words).resources.clients_together is together
