"""Whatever fails, server and runtime both end, and the reason is on the screen."""

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fedkd.config import ConfigError
from fedkd.rounds import Interrupted, silent
from fedkd.simulations import ray as room
from fedkd.simulations.local import run_local
from fedkd.simulations.machine import check_machine
from fedkd.simulations.ray import run_ray
from tests.conftest import Tiny

pytestmark = pytest.mark.usefixtures("lean")


class InProcess:
    """A backend without Ray: workers are threads. What `fails` names raises instead."""

    num_workers = 1
    fails = ""

    def __init__(self, config: dict[str, Any]) -> None:
        self._fail("start")

    def build(self, app_fn: Callable[[], Any]) -> None:
        self._fail("pool")
        self._app = app_fn()

    def process_message(self, message: Any, context: Any) -> Any:
        return self._app(message, context), context

    def terminate(self) -> None: ...

    def _fail(self, what: str) -> None:
        if self.fails == what:
            raise OSError(f"no {what} today")


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    backend = "flwr.server.superlink.fleet.vce.backend.raybackend.RayBackend"
    monkeypatch.setattr(backend, InProcess)
    monkeypatch.setattr(room, "_ray", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(InProcess, "fails", "")
    yield
    assert [t for t in threading.enumerate() if not t.daemon] == [threading.main_thread()]


@pytest.mark.parametrize("what", ["start", "pool"])
def test_a_backend_that_does_not_start_ends_the_server(
    what: str, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(InProcess, "fails", what)
    with pytest.raises(RuntimeError, match=rf"runtime failed: OSError: no {what} today"):
        run_ray(tiny("rounds=1"))


@pytest.mark.parametrize("thread", ["add_messages_to_queue", "put_message_into_state"])
def test_a_thread_of_the_runtime_that_dies_ends_the_server(
    thread: str, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flwr.server.superlink.fleet.vce import vce_api

    def dies(state: Any, *_: Any, **__: Any) -> None:
        state.nothing_of_this_name()

    # Called by Flower's own function, as a fault of its would be.
    names = {"dies": dies, "__name__": vce_api.__name__}
    exec("def thread(*words):\n    dies(*words)", names)
    monkeypatch.setattr(vce_api, thread, names["thread"])
    with pytest.raises(RuntimeError, match=r"runtime failed: AttributeError: .*nothing_of"):
        run_ray(tiny("rounds=1"))


@pytest.mark.parametrize(
    "error", [RuntimeError("no quorum"), KeyError("x"), SystemExit(3), ConfigError("clients: 3")]
)
def test_what_ends_the_server_is_raised_as_it_is(
    error: BaseException, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    def job(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(room, "run_job", job)
    with pytest.raises(type(error)) as caught:
        run_ray(tiny("rounds=1"))
    assert caught.value is error


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("resources.client_gpus=1000", r"client_gpus: 1000 asked .* set resources\.client_gpus="),
        (
            "resources.client_cpus=100000",
            r"client_cpus: 100000 asked .* set resources\.client_cpus",
        ),
    ],
)
def test_processors_that_are_not_here_are_refused_before_a_folder_exists(
    word: str, expected: str, tiny: Tiny, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=expected):
        run_ray(tiny(word))
    assert not (tmp_path / "runs").exists()


def test_a_gpu_that_is_not_here_is_refused_without_ray_too(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match=r"client_gpus: 0\.5 asked .* has no GPU"):
        run_local(tiny("resources.client_gpus=0.5"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_machine(tiny("resources.client_gpus=0.5"))
    with pytest.raises(ConfigError, match=r"a whole number, got 1\.5"):
        check_machine(tiny("resources.client_gpus=1.5"))


def test_rays_own_count_of_processors_is_looked_at_too(tiny: Tiny) -> None:
    nodes = [{"Alive": True, "Resources": {"CPU": 2.0}}, {"Alive": False, "Resources": {"GPU": 8}}]
    room._check_room(tiny("resources.client_cpus=2"), nodes)
    with pytest.raises(ConfigError, match=r"client_cpus: 3 asked .* sees 2 CPU"):
        room._check_room(tiny("resources.client_cpus=3"), nodes)
    with pytest.raises(ConfigError, match=r"client_gpus: 1 asked .* sees 0 GPU"):
        room._check_room(tiny("resources.client_gpus=1"), nodes)


def test_a_short_folder_stands_in_for_one_that_will_not_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    long = tmp_path / "a-long-scratch-folder-as-batch-systems-make-them" / "job-1234567"
    long.mkdir(parents=True)
    for unfit in (long, tmp_path / "missing"):
        monkeypatch.setenv("TMPDIR", str(unfit))
        with room._short_folder() as folder:
            assert Path(folder).is_dir()
            assert len(os.fsencode(Path(folder) / room._SOCKET)) <= room._LONGEST
        assert not Path(folder).exists()
    monkeypatch.setenv("TMPDIR", "/tmp")
    with room._short_folder() as folder:
        assert folder is None


def test_rays_processes_get_the_path_of_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", ["/a", "", "/b"])
    monkeypatch.setenv("PYTHONPATH", "/before")
    with room._python_path():
        assert os.environ["PYTHONPATH"] == os.pathsep.join(["/a", str(Path.cwd()), "/b"])
    assert os.environ["PYTHONPATH"] == "/before"


def test_ray_that_does_not_start_is_one_line(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the real `_ray`

    def init(**_: Any) -> None:
        raise ValueError("the object store needs more memory")

    monkeypatch.setattr("ray.init", init)
    with pytest.raises(RuntimeError, match=r"started: ValueError: the object store .* --runner l"):
        run_ray(tiny("rounds=1"))


def test_a_start_that_never_comes_back_is_given_up() -> None:
    for_ever = threading.Event()

    def interrupt(*_: object, **__: object) -> None:
        raise Interrupted

    def start(seconds: float, call: Callable[[], object], notify: Any = silent) -> int:
        with room._within(seconds, call, notify):
            return len(threading.enumerate())

    before = len(threading.enumerate())
    assert start(60, lambda: None) == before + 1  # Ray's processes end with the thread
    with pytest.raises(TimeoutError, match=r"no answer within 0\.2 seconds"):
        start(0.2, for_ever.wait)
    with pytest.raises(Interrupted):
        start(60, for_ever.wait, interrupt)
    for_ever.set()
    with pytest.raises(ZeroDivisionError):
        start(60, lambda: 1 // 0)


def test_a_process_of_rays_that_dies_ends_the_run(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = iter([None, None])
    monkeypatch.setattr(room, "_dead", lambda: next(states, "gcs_server"))
    with pytest.raises(RuntimeError, match="Ray's process gcs_server has died"):
        run_ray(tiny("rounds=1"))
