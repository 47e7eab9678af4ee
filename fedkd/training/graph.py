"""A step over tensors that is captured once and then replayed.

A small network's step is bound by the time it takes to launch its operations one by one. On CUDA
a step that has been taken a few times becomes a graph, which is launched at once; elsewhere the
same code runs without one, so that what it does can be tested on a CPU.
"""

from __future__ import annotations

import gc
import logging
import random
import threading
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

Graphs = Literal["auto", "on", "off"]

_default: ContextVar[Graphs] = ContextVar("graphs", default="auto")


@contextmanager
def default_graphs(graphs: Graphs) -> Iterator[None]:
    """What "auto" means inside a block: a run's `resources.graphs`."""
    token = _default.set(graphs)
    try:
        yield
    finally:
        _default.reset(token)


def check_graphs(graphs: object) -> Graphs:
    """What `Graphs` names; true and false are on and off. Raises `ValueError`."""
    if isinstance(graphs, bool):
        return "on" if graphs else "off"
    for known in ("auto", "on", "off"):
        if graphs == known:
            return known
    raise ValueError(f"graphs: expected auto, on or off, got {graphs!r}")


# Steps taken in a shape before it is captured: libraries choose their kernels, optimisers and
# lazy layers make their state.
WARM = 3

Outputs = Any
"""A tensor, or a tuple of them."""


class Captured:
    """A function of tensors, as a graph once it has been called a few times.

    The first calls in every shape are made as they are, and count: nothing is computed twice or
    put back. Later ones write their arguments over those of the capture and replay it. What the
    function changes (weights, moments, buffers) must be changed in place; what it reads and does
    not get as an argument must stay where it is, and may be written over between calls. A number
    that is fetched from the device (`.item()`, `nonzero`), drawn or counted on the host cannot be
    captured: then all calls are made as they are, which is announced once.

    On another device than CUDA, `graphs="on"` does the same with the function itself for a replay.

    Args:
        function: Tensors -> a tensor or a tuple of them.
        device: Where it computes.
        graphs: "auto" captures on CUDA, "on" as well, "off" never.
        generators: Generators on the device that the function draws from; the default one is known.
        modules: Their attributes that are no tensors must not change from call to call.
        what: Name of the function in messages.
    """

    def __init__(
        self,
        function: Callable[..., Outputs],
        device: torch.device,
        graphs: Graphs = "auto",
        *,
        generators: Iterable[torch.Generator] = (),
        modules: Iterable[nn.Module] = (),
        what: str = "a step",
    ) -> None:
        self._function = function
        self._device = device
        self._cuda = device.type == "cuda"
        graphs = check_graphs(graphs)
        if graphs == "auto":
            graphs = _default.get()
        self._captures = graphs == "on" or (graphs == "auto" and self._cuda)
        self._generators = generators  # some may be made by the first calls
        self._modules = tuple(modules)
        self._what = what
        self._freezes = self._cuda  # what the host does is frozen by a graph, and by it alone
        self._calls: dict[Hashable, int] = {}
        self._replays: dict[Hashable, _Replay] = {}
        self._stream = _stream(device) if self._captures and self._cuda else None

    @property
    def captures(self) -> bool:
        """Whether calls are, or will be, replayed."""
        return self._captures

    @property
    def count(self) -> int:
        """Number of captures."""
        return len(self._replays)

    def __call__(self, *inputs: Tensor, key: Hashable = ()) -> Outputs:
        """The function's outputs; those of a replay are written over by the next one.

        Args:
            *inputs: On the device.
            key: What else the function depends on.
        """
        if not self._captures:
            return self._function(*inputs)
        shapes = tuple((tuple(t.shape), t.dtype) for t in inputs)
        place = (key, shapes)
        if (replay := self._replays.get(place)) is not None:
            return replay(inputs)
        taken = self._calls[place] = self._calls.get(place, 0) + 1
        if taken <= WARM:
            outputs, obstacle = self._as_it_is(inputs, watched=taken == WARM)
            if obstacle is not None:
                self.give_up(obstacle)
            return outputs
        try:
            replay = self._captured(inputs)
        except _Obstacle as obstacle:
            self.give_up(str(obstacle))
            return self._function(*inputs)
        self._replays[place] = replay
        return replay(inputs)

    def forget(self) -> None:
        """Let go of all captures and their memory."""
        self._replays.clear()

    def give_up(self, reason: str) -> None:
        """Capture nothing from now on. Announced once.

        Args:
            reason: Why.
        """
        if self._captures:
            logger.warning(
                "%s runs without a graph, operation by operation: %s", self._what, reason
            )
        self._captures = False
        self._replays.clear()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Inside, work goes to the stream of the captures.

        Autograd's nodes belong to the stream on which they were made, and last as long as anything
        that was computed with them. One of another stream spoils a capture: whatever shares
        weights with the function is to be computed here.
        """
        if self._stream is None:
            yield
            return
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            current.wait_stream(self._stream)

    # -- as it is ----------------------------------------------------------------------------

    def _as_it_is(self, inputs: Sequence[Tensor], *, watched: bool) -> tuple[Outputs, str | None]:
        """The outputs and, if it was watched, what stands against a capture."""
        watched = watched and self._freezes
        before = _host_state(self._modules) if watched else None
        with self.aside():
            if before is None:
                return self._function(*inputs), None
            with _watched(self._cuda) as seen:
                outputs = self._function(*inputs)
        return outputs, seen[0] if seen else _host_change(before, self._modules)

    # -- captured ----------------------------------------------------------------------------

    def _captured(self, inputs: Sequence[Tensor]) -> _Replay:
        static = tuple(tensor.clone() for tensor in inputs)
        if not self._cuda:
            return _Replay(static, None, None, self._function)
        before = _host_state(self._modules)
        own = tuple(self._generators)
        devices = [torch.cuda.default_generators[_index(self._device)], *own]
        states = [generator.get_state() for generator in devices]
        graph = torch.cuda.CUDAGraph()
        for generator in own:
            graph.register_generator_state(generator)
        torch.cuda.synchronize(self._device)
        collects = gc.isenabled()
        gc.disable()  # what is collected meanwhile might have to wait for the device
        try:
            with self.aside():
                graph.capture_begin(capture_error_mode="thread_local")
                try:
                    outputs = self._function(*static)
                except BaseException:
                    with suppress(RuntimeError):
                        graph.capture_end()
                    raise
                graph.capture_end()
        except RuntimeError as error:
            self._heal(devices, states)
            raise _Obstacle(" ".join(str(error).split())[:300]) from error
        finally:
            if collects:
                gc.enable()
        if (change := _host_change(before, self._modules)) is not None:
            _restore(before)
            raise _Obstacle(change)
        return _Replay(static, graph, outputs, self._function)

    def _heal(self, devices: Sequence[torch.Generator], states: Sequence[Tensor]) -> None:
        """After a capture that failed generators believe that they are still captured."""
        with suppress(RuntimeError):
            torch.cuda.synchronize(self._device)
        for generator, state in zip(devices, states, strict=True):
            fresh = torch.Generator(self._device)
            fresh.set_state(state)
            generator.graphsafe_set_state(fresh)


@dataclass(frozen=True)
class _Replay:
    """One capture.

    Attributes:
        inputs: Where its arguments lie.
        graph: None where the function itself is called.
        outputs: What it writes.
        function: What was captured.
    """

    inputs: tuple[Tensor, ...]
    graph: torch.cuda.CUDAGraph | None
    outputs: Outputs
    function: Callable[..., Outputs]

    def __call__(self, values: Sequence[Tensor]) -> Outputs:
        for static, value in zip(self.inputs, values, strict=True):
            static.copy_(value, non_blocking=True)
        if self.graph is None:
            return self.function(*self.inputs)
        self.graph.replay()
        return self.outputs


_streams = threading.local()


def _stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of this thread's captures: memory and cuBLAS' workspaces belong to a stream.

    A new one for each training would let them grow with the number of trainings.
    """
    known: dict[str, torch.cuda.Stream] = _streams.__dict__
    name = str(_index(device))
    if name not in known:
        known[name] = torch.cuda.Stream(device)
    return known[name]


class _Obstacle(RuntimeError):
    """Why something cannot be captured."""


@contextmanager
def _watched(cuda: bool) -> Iterator[list[str]]:
    """Collects what made the host wait for the device."""
    seen: list[str] = []
    if not cuda:
        yield seen
        return
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield seen
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    for warning in caught:
        text = str(warning.message)
        if "Synchronization debug mode" in text:  # is called a prototype, once
            continue
        if "synchronizing CUDA operation" in text:
            place = f"{warning.filename}:{warning.lineno}"
            seen.append(f"it fetches a number from the device ({place})")
        else:
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )


@dataclass(frozen=True)
class _Host:
    """What a capture would freeze: the host's generators, and attributes of modules."""

    torch: Tensor
    numpy: Any
    python: Any
    attributes: tuple[tuple[str, object], ...]


def _host_state(modules: Iterable[nn.Module]) -> _Host:
    return _Host(
        torch.get_rng_state(),
        np.random.get_state(),
        random.getstate(),
        tuple(
            (f"{type(module).__name__}.{name}", value)
            for root in modules
            for module in root.modules()
            for name, value in vars(module).items()
            if isinstance(value, (bool, int, float, str))
        ),
    )


def _host_change(before: _Host, modules: Iterable[nn.Module]) -> str | None:
    """What a call has changed on the host, in words."""
    after = _host_state(modules)
    drawn = (
        not torch.equal(before.torch, after.torch)
        or before.python != after.python
        or before.numpy[2] != after.numpy[2]
        or not np.array_equal(before.numpy[1], after.numpy[1])
    )
    if drawn:
        return "it draws random numbers on the host"
    for (name, old), (_, new) in zip(before.attributes, after.attributes):
        if old != new:
            return f"it counts on the host ({name})"
    return None


def _restore(before: _Host) -> None:
    torch.set_rng_state(before.torch)
    np.random.set_state(before.numpy)
    random.setstate(before.python)


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index
