"""The main job: Flower's simulation runtime with its Ray backend, driven from Python.

`run_simulation` is the only way to reach the actor option that cures Flower's pool of dead
actors: with `max_restarts=-1` Ray revives a killed actor, so putting it back is right.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from fedkd.io.extras import extra

with extra("simulation", "fedkd.simulations.ray"):
    from flwr.app import Context
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp

from fedkd.config import ConfigError, Experiment
from fedkd.io.text import PlainFormatter
from fedkd.rounds import Interrupted, Notify, silent
from fedkd.runs.directory import RunDirectory
from fedkd.simulations.client_app import make_client_app
from fedkd.simulations.job import begun, players_of, run_job
from fedkd.simulations.machine import cpus_here

logger = logging.getLogger("fedkd")

# Nothing is sent anywhere, installed or downloaded at run time.
OFFLINE = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "0",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
}


def run_ray(
    experiment: Experiment,
    *,
    run: RunDirectory | None = None,
    notify: Notify = silent,
    client_app: ClientApp | None = None,
    nodes: int | None = None,
) -> RunDirectory:
    """Run an experiment on Flower's simulation runtime and return its run directory.

    Args:
        experiment: What to run; `resources` says how many clients work at once.
        run: An earlier run to go on with; default: a new one.
        notify: Hears of progress, from the server's thread.
        client_app: Another client app (fault injection).
        nodes: Size of the federation; default: the experiment's number of clients.

    Raises:
        ConfigError: the experiment cannot be run.
        RuntimeError: the runtime failed; the run can be resumed.
    """
    os.environ.update(OFFLINE)
    run, context = begun(experiment, run, workers=True)
    players = None if nodes else players_of(experiment)
    free = partial(workers, experiment)
    job = partial(run_job, run=run, context=context, workers=free, players=players)
    server = _Server(lambda grid, watched: job(grid, notify=watched), notify)
    with _flower_logs_to(run), _ray(experiment, notify):
        server.simulate(
            client_app or make_client_app(), nodes or players or experiment.clients, experiment
        )
    return run


def workers(experiment: Experiment) -> int:
    """How many clients Ray's nodes have room for at once; 1 before Ray has started."""
    import ray

    if not ray.is_initialized():
        return 1
    asked = {"CPU": experiment.resources.client_cpus, "GPU": experiment.resources.client_gpus}
    wanted = {name: share for name, share in asked.items() if share}
    rooms = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    count = sum(min(int(room.get(name, 0) / wanted[name]) for name in wanted) for room in rooms)
    return max(count, 1)


class _Server:
    """The job in Flower's server thread, and the runtime around it: neither outlives the other.

    Flower waits for the server's thread when the runtime fails, and the server waits for clients
    that will never answer. So every event of the job first asks whether the runtime still lives.
    """

    def __init__(self, job: Callable[[Grid, Notify], Any], notify: Notify) -> None:
        self._job, self._notify = job, notify
        self._thread: threading.Thread | None = None
        self._finished = False
        self._error: BaseException | None = None
        self._runtime: BaseException | None = None

    def simulate(self, client_app: ClientApp, nodes: int, experiment: Experiment) -> None:
        """Run it. Raises what ended the job, or `RuntimeError` if the runtime failed."""
        from flwr.simulation import run_simulation

        app = ServerApp()
        app.main()(self._main)
        cpus, gpus = experiment.resources.client_cpus, experiment.resources.client_gpus
        actor: dict[str, Any] = {"num_cpus": cpus, "num_gpus": gpus, "max_restarts": -1}
        try:
            with self._threads_watched():
                run_simulation(
                    server_app=app,
                    client_app=client_app,
                    num_supernodes=nodes,
                    backend_config={"client_resources": actor},
                )
        except BaseException as error:
            self._stop(error)
            if not isinstance(error, Exception) or error is self._error:
                raise
        if self._thread is not None:
            self._thread.join()
        if self._runtime is not None:
            raise RuntimeError(
                f"Flower's simulation runtime failed: {_cause(self._runtime)}"
            ) from self._runtime
        if self._error is not None:
            raise self._error
        if not self._finished:
            raise RuntimeError("Flower's simulation runtime ended before the run was finished")

    def _main(self, grid: Grid, context: Context) -> None:
        self._thread = threading.current_thread()
        try:
            self._tell("waiting")
            self._job(grid, self._tell)
            self._finished = True
        except BaseException as error:
            if self._runtime is None:
                self._error = error
            raise

    def _tell(self, event: str, **facts: Any) -> None:
        if self._runtime is None and (kind := _dead()) is not None:
            self._runtime = RuntimeError(
                f"Ray's process {kind} has died; out of memory? Lower the number of clients at "
                "once (resources.client_cpus)"
            )
        if self._runtime is not None:
            raise RuntimeError("the runtime has stopped")
        if event != "waiting":
            self._notify(event, **facts)
        else:
            self._notify(event)

    def _stop(self, error: BaseException) -> None:
        if self._runtime is None and self._error is None and not self._finished:
            self._runtime = error

    @contextmanager
    def _threads_watched(self) -> Iterator[None]:
        """A thread of Flower's that dies ends the job too: nobody would carry its messages."""
        before = threading.excepthook

        def died(facts: threading.ExceptHookArgs) -> None:
            trace = facts.exc_traceback
            while trace is not None:
                if trace.tb_frame.f_globals.get("__name__", "").startswith("flwr."):
                    self._stop(facts.exc_value or RuntimeError(facts.exc_type.__name__))
                trace = trace.tb_next
            logger.error("a thread died", exc_info=facts.exc_value)

        threading.excepthook = died
        try:
            yield
        finally:
            threading.excepthook = before


def _cause(error: BaseException) -> str:
    """The first of a chain of exceptions: the others report that something failed."""
    while (earlier := error.__cause__ or error.__context__) is not None:
        error = earlier
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


@contextmanager
def _flower_logs_to(run: RunDirectory) -> Iterator[None]:
    """Send Flower's, Ray's and our own log records to the run's log file for a while."""
    handler = logging.FileHandler(run.log, encoding="utf-8")
    handler.setFormatter(PlainFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    loggers = [logging.getLogger(name) for name in ("flwr", "ray", "fedkd", "strategies")]
    before = [(log.handlers[:], log.propagate, log.level) for log in loggers]
    for log in loggers:
        log.handlers, log.propagate = [handler], False
        log.setLevel(min(log.level or logging.INFO, logging.INFO))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, (handlers, propagate, level) in zip(loggers, before, strict=True):
            log.handlers, log.propagate = handlers, propagate
            log.setLevel(level)
        handler.close()


@contextmanager
def _ray(experiment: Experiment, notify: Notify) -> Iterator[None]:
    """Ray, started here and not by Flower: a failure is known before anybody waits for it."""
    import ray

    if ray.is_initialized():
        yield
        return
    resources = experiment.resources
    with running_ray(resources.ray_address, notify, resources.total_cpus):
        _check_room(experiment, ray.nodes())
        yield


@contextmanager
def running_ray(address: str | None, notify: Notify, cpus: int | None = None) -> Iterator[None]:
    """Ray on this machine alone, or the cluster at `address`; nothing of ours stays behind.

    A runtime that was started before, in a notebook, is used and left alone.

    Raises:
        RuntimeError: it cannot be started, or joined.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    options: dict[str, Any] = {
        "address": address or "local",  # a cluster that nobody named is never joined
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "job_config": _job_config(),
    }
    with _short_folder() as folder, _python_path(), ExitStack() as stack:
        if address is None:
            options |= {"include_dashboard": False, "_temp_dir": folder}
            options["num_cpus"] = cpus or cpus_here()
        else:  # its processes have the environment of whoever started them
            known = ("PYTHONPATH", "FEDKD_DATA", *OFFLINE)
            ours = {name: os.environ[name] for name in known if name in os.environ}
            options["runtime_env"] = {"env_vars": ours}
        try:
            stack.enter_context(_within(START_SECONDS, partial(ray.init, **options), notify))
        except Interrupted:
            raise
        except Exception as error:
            if not isinstance(error, TimeoutError):
                ray.shutdown()  # what was started before the failure
            if address is not None:
                raise RuntimeError(
                    f"resources.ray_address: no Ray cluster could be joined at {address!r} "
                    f"({_cause(error)}); start one with ray start --head, or leave the key out"
                ) from error
            raise RuntimeError(
                f"Ray, which runs the clients, could not be started: {_cause(error)}; to do "
                "without it: --runner local"
            ) from error
        try:
            yield
        finally:
            ray.shutdown()


def _dead() -> str | None:
    """The process of Ray's, of those that it cannot do without, that has died."""
    from ray._private import worker

    node = getattr(worker, "_global_node", None)
    gone = [] if node is None else [kind for kind, _ in node.dead_processes()]
    return next((kind for kind in ("gcs_server", "raylet") if kind in gone), None)


@contextmanager
def _within(seconds: float, start: Callable[[], object], notify: Notify) -> Iterator[None]:
    """Call `start`, which may wait for ever in compiled code for a process that died.

    It has a thread of its own that lives as long as the context: Linux ends Ray's processes with
    the thread that started them.

    Raises:
        TimeoutError: it has not come back; its thread is given up.
    """
    failed: list[BaseException] = []
    back, over = threading.Event(), threading.Event()

    def call() -> None:
        try:
            start()
        except BaseException as error:
            failed.append(error)
        back.set()
        over.wait()

    threading.Thread(target=call, daemon=True).start()
    limit = time.monotonic() + seconds
    try:
        while not back.wait(0.1):
            notify("waiting")  # raises after Ctrl-C
            if time.monotonic() > limit:
                raise TimeoutError(f"no answer within {seconds:g} seconds; is memory or disk full?")
        if failed:
            raise failed[0]
        yield
    finally:
        over.set()


def _job_config() -> Any:
    """Ray puts the working directory *first* on the workers' path, where it would hide modules.

    It is on the path already, at its end, for plugins.
    """
    from ray.job_config import JobConfig

    class Elsewhere(JobConfig):
        def _runtime_env_has_working_dir(self) -> bool:
            return True

    return Elsewhere()


@contextmanager
def _python_path() -> Iterator[None]:
    """Ray's processes find the modules that this one finds, in the same order."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(path or str(Path.cwd()) for path in sys.path)
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


# Ray's own limits are shorter; some of its waits have none.
START_SECONDS = 120.0

# The longest socket that Ray makes below its folder, and what the system lets a socket's path be.
_SOCKET = "ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
_LONGEST = 103 if sys.platform == "darwin" else 107


@contextmanager
def _short_folder() -> Iterator[str | None]:
    """A folder for Ray's sockets and logs where its own choice will not do, else None.

    Batch systems give a long TMPDIR, below which a socket's path is longer than the system allows.
    """
    chosen = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    fits = len(os.fsencode(Path.cwd() / chosen / _SOCKET)) <= _LONGEST
    if fits and Path(chosen).is_dir() and os.access(chosen, os.W_OK):
        yield None
        return
    problem = f"{chosen} is {'not writable' if fits else 'too long for the sockets of Ray'}"
    try:
        folder = tempfile.mkdtemp(prefix="fedkd-", dir="/tmp")
    except OSError as error:
        raise ConfigError(
            f"TMPDIR: {problem}, and /tmp cannot be used ({error.strerror}): set TMPDIR to a short "
            "folder, or run in one process, without Ray: --runner local"
        ) from None
    logger.info("%s: Ray uses %s", problem, folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _check_room(experiment: Experiment, nodes: list[dict[str, Any]]) -> None:
    """Refuse what no machine of the cluster has: Flower would make an empty pool of workers."""
    for key, name, wanted in (
        ("client_cpus", "CPU", experiment.resources.client_cpus),
        ("client_gpus", "GPU", experiment.resources.client_gpus),
    ):
        most = max((node["Resources"].get(name, 0) for node in nodes if node["Alive"]), default=0)
        if wanted > most:
            raise ConfigError(
                f"resources.{key}: {wanted:g} asked for each client, but Ray sees {most:g} {name} "
                f"here; set resources.{key}={math.floor(most)}"
            )
