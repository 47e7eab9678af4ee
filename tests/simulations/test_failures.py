"""How commands end when something is wrong: one line, the exit code, never a traceback."""

import errno
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from fedkd.config import ConfigError
from fedkd.simulations.cli import partition
from fedkd.simulations.failures import failure_of, noted
from tests.simulations.conftest import Fedkd


@pytest.fixture(autouse=True)
def tracebacks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where tracebacks are written."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def raised(make: Callable[[], object]) -> BaseException:
    try:
        make()
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


def ours(error: BaseException) -> Callable[[], object]:
    """A function of `simulations` that raises the error by a `raise` statement."""
    names: dict[str, object] = {"__name__": "fedkd.simulations.example", "error": error}
    exec("def fail():\n    raise error", names)
    return names["fail"]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("rounds: expected int"), 2),
        (ValueError("fusion 'x' needs labels"), 2),
        (FileNotFoundError("no images in /x"), 2),
        (RuntimeError("every worker died"), 1),
        (OSError(errno.ENOSPC, "No space left on device", "run.log"), 1),
        (PermissionError(errno.EACCES, "Permission denied", "runs"), 2),
        (MemoryError(), 1),
        (KeyboardInterrupt(), 130),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 141),
        (KeyError("x"), 70),
        (AssertionError(), 70),
    ],
    ids=repr,
)
def test_an_exception_of_ours_has_its_exit_code(error: BaseException, code: int) -> None:
    assert failure_of(raised(ours(error))).code == code


def test_what_a_library_raises_in_our_code_is_an_error_of_ours_not_of_the_user() -> None:
    names: dict[str, object] = {"__name__": "fedkd.example", "np": np, "torch": torch}
    exec("def add():\n    np.zeros(2) + np.zeros(3)\ndef mul():\n    torch.ones(2) @ 3", names)
    for name in ("add", "mul"):
        failure = failure_of(raised(names[name]))
        assert failure.code == 70
        assert "internal error" in failure.text
        assert "fedkd.example, line" in failure.text


def test_the_traceback_of_an_internal_error_is_in_the_file_it_names() -> None:
    text = failure_of(raised(ours(KeyError("lost")))).text
    file = Path(re.search(r"the traceback is in (\S+);", text)[1])
    written = file.read_text()
    assert "KeyError: 'lost'" in written
    assert "Traceback" in written
    assert "report" in text
    assert "\n" not in text


def test_an_error_in_the_users_own_module_is_told_apart(tmp_path: Path) -> None:
    plugin = tmp_path / "mine.py"
    plugin.write_text("def fail():\n    return {}['x']\n")
    names: dict[str, object] = {"__name__": "mine"}
    exec(compile(plugin.read_text(), str(plugin), "exec"), names)
    failure = failure_of(raised(names["fail"]))
    assert failure.code == 1
    assert failure.text.startswith(f"{plugin}, line 2: KeyError")


def test_a_message_of_many_lines_control_characters_or_a_megabyte_is_one_line() -> None:
    text = failure_of(ConfigError("a\nb\x1b[2Jc" + "d" * 10**6)).text
    assert text.startswith(r"a b\x1b[2Jc")
    assert len(text) < 2000
    assert text.isprintable()


def test_a_failed_run_names_its_log_and_how_to_go_on(tmp_path: Path) -> None:
    log = tmp_path / "run.log"

    def run() -> None:
        with noted(log, "fedkd run --resume x"):
            ours(RuntimeError("every worker died"))()

    failure = failure_of(raised(run))
    assert failure.text == f"every worker died (log: {log}; go on with: fedkd run --resume x)"
    assert "RuntimeError: every worker died" in log.read_text()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["run", "c.yaml", "--rounds", "5"], "dashes: rounds=5 (see fedkd run --help)"),
        (["run", "c.yaml", "--student.model=mlp"], "dashes: student.model=mlp"),
        (["partition", "c.yaml", "--clients", "5"], "dashes: clients=5"),
        (["run", "c.yaml", "--runer", "local"], "no option --runer; did you mean '--runner'?"),
        (["export", "run", "--fromat", "onnx"], "no option --fromat; did you mean '--format'?"),
        (["rnu"], "there is no command 'rnu'; did you mean 'run'?"),
        (["privacy", "pln"], "there is no command 'pln'; did you mean 'plan'?"),
        (["partition"], "CONFIG is missing"),
        (["unlearn", "run"], "--client is missing"),
        (["contribution", "run", "--permutations", "x"], "'--permutations': 'x' is not a valid"),
        (["report", "a", "b"], "unexpected extra argument"),
        (["run", "--resume"], "requires an argument"),
    ],
    ids=lambda words: " ".join(words) if isinstance(words, list) else "",
)
def test_a_command_line_that_cannot_be_read_is_one_line(
    words: list[str], expected: str, fedkd: Fedkd
) -> None:
    code, _, stderr = fedkd(*words)
    assert code == 2
    assert expected in stderr
    assert stderr.startswith("fedkd: ")
    assert stderr.count("\n") == 1


def test_an_internal_error_of_a_command_is_one_line_and_70(
    fedkd: Fedkd, monkeypatch: pytest.MonkeyPatch, tracebacks: Path
) -> None:
    monkeypatch.setattr(partition, "load", lambda *_: ours(KeyError("lost"))())
    code, _, stderr = fedkd("partition", "configs/quickstart.yaml")
    assert code == 70
    assert stderr.count("\n") == 1
    assert "Traceback" not in stderr
    assert "KeyError" in next(tracebacks.glob("fedkd-*.traceback")).read_text()


def test_an_interrupt_is_130_and_one_line(fedkd: Fedkd, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(partition, "load", interrupt)
    assert fedkd("partition", "configs/quickstart.yaml") == (130, "", "fedkd: interrupted\n")
