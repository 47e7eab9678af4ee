"""Configs: what is accepted, and that every mistake is one helpful line."""

from pathlib import Path

import pytest
import yaml

from fedkd.build import check
from fedkd.config import ConfigError, load_experiment, make_experiment, parse_yaml

# Studies, in folders of their own, are tested in test_central.py.
CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_shipped_config_is_valid(path: Path) -> None:
    check(load_experiment(path))


def test_resolved_config_reads_back_as_itself() -> None:
    experiment = make_experiment({"fusion": ["entropy"]}, ["distillation.losses=[kd]"])
    assert make_experiment(yaml.safe_load(experiment.to_yaml())) == experiment
    assert make_experiment(parse_yaml(experiment.to_json(), "json")) == experiment


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("rouns=3", "rouns: unknown key; did you mean 'rounds'?"),
        ("data.transfr.size=3", "data.transfr: unknown key; did you mean 'transfer'?"),
        ("data.transfer.sizes=3", "data.transfer.sizes: unknown key; did you mean 'size'?"),
        ("rounds=fast", "rounds: input should be a valid integer"),
        ("rounds=0", "rounds: input should be greater than or equal to 1, got 0"),
        ("teachers.optimizer.name=adm", "expected 'sgd', 'adam' or 'adamw', got 'adm'; did you"),
        ("rounds.x=3", "rounds is a value, not a section"),
        ("distillation.losses.7.weight=3", "'7' is not an index of a list of 2"),
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
