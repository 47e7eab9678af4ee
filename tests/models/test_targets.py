"""Models that any importable function makes: what it is given, refusals, the rule of plugins."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fedkd.config import Component, ConfigError, import_trusted, make_experiment
from fedkd.models import targets
from fedkd.models.build import check_entry
from fedkd.privacy.policy import PolicyRefused, check_config
from fedkd.rounds import ExperimentContext
from fedkd.runs.directory import RunDirectory
from fedkd.runs.export import load_student
from fedkd.simulations.local import run_local
from fedkd.studies.central.config import Central
from tests.conftest import Tiny
from tests.models.built import built
from tests.simulations.test_policy import strictest

MODULE = """
from torch import nn

def wide(num_classes, width=4):
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(width), nn.Linear(width, num_classes))

def mine(outputs, colours, side, *, width=4):
    inputs = colours * side * side
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, width), nn.Linear(width, outputs))

def fixed():
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(7))

def wrong(num_classes):
    return "a network"

def broken(num_classes):
    raise KeyError("nothing")

number = 3
"""
MINE = {"arguments": {"classes": "outputs", "channels": "colours", "size": "side"}}


@pytest.fixture
def functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module `my_nets` beside the config; nothing of it is admitted yet."""
    (tmp_path / "my_nets.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path, str(tmp_path)])
    monkeypatch.setattr(targets, "_ADMITTED", {})
    sys.modules.pop("my_nets", None)


@pytest.mark.usefixtures("functions")
def test_what_a_function_is_told_of_the_images() -> None:
    for name in ("my_nets:wide", "my_nets:mine"):
        targets.admit(name)
    assert built("my_nets:wide", 3, options={"width": 9}).head.weight.shape == (3, 9)
    first = built("my_nets:mine", 3, 2, options={**MINE, "width": 5})
    assert first.head.weight.shape == (3, 5)
    again = built("my_nets:mine", 3, 2, options={**MINE, "width": 5})
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters()))


def test_a_librarys_function_and_its_own_statistics(tmp_path: Path) -> None:
    targets.admit("timm:create_model")
    options = {"model_name": "resnet10t", "in_chans": 1}
    plain = built("timm:create_model", 4, size=32, options=options)
    assert plain.mean.flatten().tolist() == [0.5]
    colour = {**options, "in_chans": 3}
    file = tmp_path / "w.pt"
    torch.save(built("timm:create_model", 4, 3, 32, options=colour).body.state_dict(), file)
    own = {**colour, "weights": str(file)}
    begun = built("timm:create_model", 4, 3, 32, options=own, file=file)
    assert begun.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    assert begun.resize is None
    chosen = {**own, "mean": [0.1] * 3, "std": [1, 1, 1]}
    assert built("timm:create_model", 4, 3, 32, options=chosen, file=file).std.mean() == 1


@pytest.mark.usefixtures("functions")
@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"target": "wide"}, r"student\.model: target: expected package\.function, got 'wide'"),
        ({"target": "my_nets.wid"}, "plugins: module 'my_nets' has no 'wid'; did you mean 'wide'"),
        ({"target": "my_nets.number"}, "plugins: 'number' of module 'my_nets' is int, not a func"),
        ({"target": "no_such.net"}, "plugins: cannot import 'no_such:net'"),
        ({"target": "my_nets.fixed"}, r"expected logits \(2, 4\) .*, got \(2, 7\); say in `arg"),
        ({"target": "my_nets.wrong"}, "expected a torch.nn.Module, it made str"),
        ({"target": "my_nets.broken"}, r"fails with \(num_classes=4\): KeyError: 'nothing'"),
        ({"target": "my_nets.mine"}, r"missing a required argument: 'outputs' \(arguments: outpu"),
        ({"target": "my_nets.wide", "depth": 3}, "got an unexpected keyword argument 'depth'"),
        ({"target": "my_nets.wide", "num_classes": 4}, "num_classes: the images decide it"),
        ({"target": "my_nets.wide", "arguments": {"class": "n"}}, "has no key 'class'; did you m"),
        ({"target": "my_nets.wide", "arguments": "n"}, "arguments: expected names such as"),
        ({"target": "my_nets.wide", "resize": "bicubic"}, "resize: .* has no size of its own"),
        ({"target": "my_nets.wide", "mean": [0.5]}, "mean and std: expected both or none"),
        ({"target": "my_nets.wide", "mean": [1, 2], "std": [1, 1]}, "mean: expected 1 values"),
        ({"target": "my_nets.wide", "mean": "x", "std": [1]}, "mean: expected a number for each"),
    ],
)
def test_what_cannot_be_is_refused_before_there_is_a_run(
    tiny: Tiny, entry: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        ExperimentContext(tiny(f"student.model={json.dumps(entry)}"))


@pytest.mark.usefixtures("functions")
def test_a_run_with_functions_for_teachers_and_student(tiny: Tiny) -> None:
    mine = json.dumps({"target": "my_nets.mine", **MINE})
    words = ("evaluation.baselines=[]", "rounds=1")
    experiment = tiny(f"teachers.models=[{mine}]", "student.model={target: my_nets.wide}", *words)
    assert experiment.plugins == ("my_nets:mine", "my_nets:wide")
    assert experiment.student.model == Component(name="my_nets:wide")
    assert make_experiment(experiment.model_dump(mode="json")).hash == experiment.hash
    run = run_local(experiment)
    assert run.read_json("summary.json")["student"]["parameters"] > 0
    # A node must allow the very functions.
    policy = strictest(experiment)
    assert policy.plugins == experiment.plugins
    check_config(policy, experiment)
    with pytest.raises(PolicyRefused, match="plugins: the run asks for my_nets:mine"):
        check_config(policy.model_copy(update={"plugins": ("my_nets",)}), experiment)
    # Whoever looks at the folder must trust it, though the module is imported.
    targets._ADMITTED.clear()
    with pytest.raises(ConfigError, match=r"'my_nets:mine' is not imported: .* add --trust"):
        load_student(RunDirectory.open(run.path))
    load_student(RunDirectory.open(run.path, trust=True))


@pytest.mark.usefixtures("functions")
def test_a_function_is_called_only_where_plugins_were_imported(tmp_path: Path) -> None:
    message = re.escape("a config names it among its plugins (plugins: ['os:system'])")
    for call in (lambda: check_entry("os:system", {}), lambda: built("os:system")):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(ConfigError, match=r"its plugin 'os:system' is not imported: it is code"):
        import_trusted(["os:system"], tmp_path, trust=False)


def test_a_study_has_them_too() -> None:
    values = {"teachers": {"models": [{"target": "my_nets.wide"}]}, "plugins": ["mine"]}
    assert Central.model_validate(values).plugins == ("mine", "my_nets:wide")


def test_a_module_keeps_its_statistics() -> None:
    body = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    kept = built(body, options={"mean": [0.1], "std": [0.2]})
    assert (float(kept.mean), float(kept.std)) == pytest.approx((0.1, 0.2))
    with pytest.raises(ValueError, match="takes no options but mean and std"):
        built(body, options={"width": 3})
