"""How often a run checks and builds what it could keep."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from fedkd.config import Experiment
from fedkd.distillation.objective import Objective
from fedkd.models.network import Network
from fedkd.registry import Registry
from fedkd.simulations.cli.main import app

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


class _Counted:
    """A pydantic validator that counts."""

    def __init__(self, validator: Any, count: Callable[[], None]) -> None:
        self._validator, self._count = validator, count

    def __getattr__(self, name: str) -> Any:
        return getattr(self._validator, name)

    def validate_python(self, *args: Any, **kwargs: Any) -> Any:
        self._count()
        return self._validator.validate_python(*args, **kwargs)


def test_a_run_validates_its_experiment_once_and_builds_each_network_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: Counter[str] = Counter()

    def counted(owner: type, method: str, name: str) -> None:
        original = getattr(owner, method)

        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, method, call)

    validator = Experiment.__pydantic_validator__
    count = _Counted(validator, lambda: counts.update(["validations"]))
    monkeypatch.setattr(Experiment, "__pydantic_validator__", count)
    counted(Registry, "check", "registry checks")
    counted(Network, "__init__", "networks")
    counted(Objective, "__init__", "objectives")
    config = yaml.safe_load(QUICKSTART.read_text())
    config |= {"clients": 3, "rounds": 1, "output": str(tmp_path)}
    config["teachers"]["epochs"] = config["distillation"]["epochs"] = 1
    file = tmp_path / "quickstart.yaml"
    file.write_text(yaml.safe_dump(config))
    result = CliRunner().invoke(app, ["run", str(file), "--runner", "local"])
    assert result.exit_code == 0, result.output
    most = {"validations": 1, "registry checks": 20, "networks": 8, "objectives": 1}
    assert counts.keys() == most.keys()
    assert all(counts[name] <= most[name] for name in most), counts
