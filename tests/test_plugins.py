"""Users' modules: where they are looked for, and why one does not come."""

import sys
from pathlib import Path

import pytest

from fedkd.config import ConfigError, make_experiment


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("random", "", r"plugins: 'random' is .*random\.py, which hides .*random\.py: give your"),
        ("sys", "", r"plugins: 'sys' is a built-in module, which hides .*sys\.py"),
        ("fedkd", "", r"plugins: 'fedkd' is .*__init__\.py, which hides .*fedkd\.py"),
        ("mine_a", "def f(:", r"importing 'mine_a' fails: SyntaxError: .*, line 1"),
        ("mine_b", "1 / 0", "importing 'mine_b' fails: ZeroDivisionError: division by zero"),
        ("mine_c", "import no_such_xyz", "cannot import 'mine_c' .*no_such_xyz"),
    ],
)
def test_a_plugin_that_does_not_come_says_why(
    name: str, text: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path, str(tmp_path)])
    with pytest.raises(ConfigError, match=expected):
        make_experiment({"plugins": [name]})
