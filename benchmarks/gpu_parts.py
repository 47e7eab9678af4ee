"""The parts of `gpu.py`: what is measured, and what it is held against."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import hashlib
import importlib.util
import inspect
import io
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import papers
import torch
from gpu import Bench, NotThere
from output_cases import divergence, masked_dkd, z_scores
from relation_cases import written_out, written_out_classes
from torch import Tensor, nn
from torch.nn import functional as F

from fedkd.data.datasets import load_dataset
from fedkd.data.images import ImageSet
from fedkd.data.partitions import partition
from fedkd.data.splits import federate
from fedkd.data.views import Draws, augmented, virtual_view
from fedkd.distillation import trainer
from fedkd.distillation.batches import OnlineBatches, TransferBatches
from fedkd.distillation.objective import Objective, Term
from fedkd.distillation.trainer import EpochRecord, distill
from fedkd.fusion import FUSIONS
from fedkd.fusion.base import FitContext, fit_rules
from fedkd.knowledge.extract import extract_many
from fedkd.knowledge.kinds import Logits
from fedkd.knowledge.payload import Bank, Knowledge, Teacher, fuse
from fedkd.losses import LOSSES
from fedkd.models.network import Network
from fedkd.privacy import dp_sgd
from fedkd.privacy.dp_sgd import Mechanism, fit_private
from fedkd.privacy.noise import SecureGenerator
from fedkd.randomness import stream_seed
from fedkd.training import batched
from fedkd.training.evaluation import evaluate
from fedkd.training.graph import Captured
from fedkd.training.numerics import deterministic
from fedkd.training.optimizers import Optimizer
from fedkd.training.supervised import Fit, fit

SGD = Optimizer(name="sgd", lr=0.05, momentum=0.9, weight_decay=5e-4)


# -- what the parts share -------------------------------------------------------------------


def pixels(count: int, classes: int, side: int = 32, seed: int = 0) -> ImageSet:
    """Random labelled images."""
    draw = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=draw)
    labels = torch.randint(classes, (count,), generator=draw)
    return ImageSet(images, labels, tuple(map(str, range(classes))))


def patterns(count: int, classes: int, side: int = 32, seed: int = 0) -> ImageSet:
    """Labelled images that can be learnt: a pattern per class under much noise."""
    draw = torch.Generator().manual_seed(7)
    shapes = torch.rand(classes, 3, 4, 4, generator=draw)
    draw.manual_seed(seed)
    labels = torch.arange(count) % classes
    whole = F.interpolate(shapes, size=(side, side))[labels]
    noisy = whole + 0.5 * torch.randn(whole.shape, generator=draw)
    images = noisy.clamp(0, 1).mul(255).to(torch.uint8)
    return ImageSet(images, labels, tuple(map(str, range(classes))))


def network(model: str, like: ImageSet, seed: int, device: str) -> Network:
    """A network for such images."""
    some = like if len(like) <= 1000 else like.subset(torch.arange(1000))
    return papers.network(model, some, seed, device)


def objective(*terms: str | tuple[str, dict[str, Any]], **when: Any) -> Objective:
    """Losses by name, with options and times."""
    parts = []
    for term in terms:
        name, options = (term, {}) if isinstance(term, str) else term
        parts.append(Term(name, LOSSES.create(name, **options), **when.get(name, {})))
    return Objective(parts)


def sync(bench: Bench) -> None:
    """Wait for the device."""
    if bench.gpu:
        torch.cuda.synchronize()


def tidy() -> None:
    """Give memory and settings back."""
    gc.collect()
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False
    torch.backends.cudnn.benchmark = False
    if torch.cuda.is_available():
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def seconds_of(bench: Bench, run: Callable[[], object]) -> float:
    """Seconds of one call, the device's work included."""
    sync(bench)
    begin = time.perf_counter()
    run()
    sync(bench)
    return time.perf_counter() - begin


def typical(bench: Bench, run: Callable[[], object], repeats: int, groups: int = 5) -> float:
    """Seconds of one call: the median over groups of repeated ones."""
    run()
    times = []
    for _ in range(groups):
        times.append(seconds_of(bench, lambda: [run() for _ in range(repeats)]) / repeats)
    return statistics.median(times)


def apart(first: Network, second: Network, start: Network | None = None) -> float:
    """Distance of two networks' weights, relative to how far they have come from `start`."""
    a, b = (_weights(net) for net in (first, second))
    reach = (a - _weights(start)).norm() if start is not None else a.norm()
    return float((a - b).norm() / reach.clamp(min=1e-30))


def _weights(net: Network) -> Tensor:
    return torch.cat([p.detach().double().flatten().cpu() for p in net.parameters()])


@contextlib.contextmanager
def exactly() -> Iterator[None]:
    """Float32 products of full precision, and no algorithm that differs from call to call."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    mode = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = mode


def takes(function: Callable[..., Any], *names: str) -> None:
    """Raise `NotThere` unless a function has these arguments."""
    missing = [name for name in names if name not in inspect.signature(function).parameters]
    if missing:
        raise NotThere(f"{function.__name__} has no argument {', '.join(missing)}")


def epochs_of(
    bench: Bench, student: Network, batches: Any, losses: Objective, epochs: int, **options: Any
) -> tuple[list[EpochRecord], list[float]]:
    """`distill` with the seconds of each epoch."""
    times: list[float] = []
    sync(bench)
    last = [time.perf_counter()]

    def on_epoch(_record: EpochRecord, _snapshot: object) -> None:
        sync(bench)
        now = time.perf_counter()
        times.append(now - last[0])
        last[0] = now

    options = {"optimizer": SGD, **options}
    history, _ = distill(student, batches, losses, epochs=epochs, on_epoch=on_epoch, **options)
    return history, times


def switched(graphs: bool) -> dict[str, Any]:
    """Arguments of `distill` that turn graphs on or off."""
    if "graphs" in inspect.signature(distill).parameters:
        return {"graphs": "on" if graphs else "off"}
    if graphs:
        raise NotThere("distill has no argument graphs")
    return {}


# -- central distillation against the literal loop ------------------------------------------


@dataclass(frozen=True)
class Central:
    """The pair of networks, and how much of it.

    Attributes:
        images: For fast ways: an epoch begins with a plain step, which counts less in long ones.
        few: For the others.
        batch: Samples per step.
        teacher: Its network.
        student: Likewise.
    """

    images: ImageSet
    few: ImageSet
    batch: int
    teacher: str
    student: str

    @classmethod
    def of(cls, bench: Bench, classes: int = 100) -> Central:
        """The published pair; on a CPU small networks."""
        if bench.gpu:
            images = pixels(64 * bench.size(390, 200), classes)
            few = images.subset(torch.arange(64 * bench.size(60, 25)))
            return cls(images, few, 64, "resnet32x4", "resnet8x4")
        images = pixels(16, classes)
        return cls(images, images, 8, "resnet8", "cnn_tiny")


KD = [("ce", {}), ("kd", {"temperature": 4.0})]
DKD = [("ce", {}), ("dkd", {"beta": 8.0})]
DKD_VRM = [("ce", {}), ("dkd", {"beta": 8.0}), ("vrm", {})]
SETS = {"ce+dkd": DKD, "ce+dkd+vrm": DKD_VRM, "ce+kd": KD}


def literal_loss(name: str, ls: Sequence[Tensor], lt: Sequence[Tensor], y: Tensor) -> Tensor:
    """The sets of losses as papers' code writes them."""
    loss = F.cross_entropy(ls[0], y)
    if name == "ce+kd":
        return loss + divergence(ls[0], lt[0])
    loss = loss + masked_dkd(ls[0], lt[0], y)
    if name == "ce+dkd":
        return loss
    a, b, d, e = (z_scores(z) for z in (*ls, *lt))
    classes = written_out_classes(torch.cat([a, b]), torch.cat([d, e]))
    return loss + written_out(a, b, d, e, diagonal=True) + 0.25 * classes


def literal_loop(bench: Bench, case: Central, name: str) -> float:
    """Seconds a step of the plain loop: float32 as torch has it, no augmentation, no checks.

    Convolutions are tried out, as papers' code asks for.

    Pixels lie on the device; a virtual view is another gather, and costs no augmentation.
    """
    images = case.few
    teacher = network(case.teacher, images, 0, bench.device).eval()
    student = network(case.student, images, 9, bench.device).train()
    optimizer = torch.optim.SGD(student.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
    assert images.labels is not None
    x, y = images.images.to(bench.device), images.labels.to(bench.device)
    two = "vrm" in name

    def epoch() -> None:
        for index in torch.randperm(len(x), device=x.device).split(case.batch):
            views = [x[index], x[index].flip(3)] if two else [x[index]]
            with torch.no_grad():
                taught = [teacher(view) for view in views]
            loss = literal_loss(name, [student(view) for view in views], taught, y[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    torch.backends.cudnn.benchmark = True
    epoch()
    spent = min(seconds_of(bench, epoch) for _ in range(2))
    torch.backends.cudnn.benchmark = False
    return spent / (len(x) // case.batch)


@dataclass(frozen=True)
class Way:
    """How `distill` is asked to go."""

    label: str
    precision: str = "float32"
    channels_last: bool = False
    graphs: bool = False
    compiled: bool = False


# The most telling first: time may end before the last.
WAYS = (
    Way("graph, bfloat16 channels_last", "bfloat16", channels_last=True, graphs=True),
    Way("graph, tf32", "tf32", graphs=True),
    Way("graph, float32", graphs=True),
    Way("eager, float32"),
    Way("eager, bfloat16 channels_last", "bfloat16", channels_last=True),
)
COMPILED = (Way("graph, compiled, bfloat16 channels_last", "bfloat16", True, True, True),)


def ours(
    bench: Bench, case: Central, losses: Objective, way: Way, epochs: int = 3
) -> tuple[float, float, list[EpochRecord]]:
    """Seconds a step of `distill`, seconds of its first epoch, and what it recorded."""
    form = torch.channels_last if way.channels_last else torch.contiguous_format
    images = case.images if way.graphs else case.few
    teacher = network(case.teacher, images, 0, bench.device).eval().to(memory_format=form)
    student = network(case.student, images, 9, bench.device).to(memory_format=form)
    if way.compiled:
        torch.compiler.reset()
        for net in (teacher, student):
            net.compile_reading()
    options = switched(way.graphs)
    half = torch.bfloat16 if way.precision == "bfloat16" else None
    batches = OnlineBatches(
        images,
        [teacher],
        losses.needs,
        augment="crop_flip",
        virtual="randaugment_flip",
        batch_size=case.batch,
        device=bench.device,
        memory_format=form,
        autocast=half,
    )
    history, times = epochs_of(
        bench, student, batches, losses, epochs, precision=way.precision, **options
    )
    return min(times[1:]) / batches.steps, times[0], history


def central(bench: Bench, ways: Sequence[Way] = WAYS) -> None:
    """Central distillation, resnet32x4 to resnet8x4, in batches of 64."""
    case = Central.of(bench)
    goals = {"ce+dkd": 4.5, "ce+dkd+vrm": 4.0}
    for name, terms in SETS.items():
        if (name == "ce+kd" and ways is COMPILED) or (name != "ce+dkd+vrm" and not bench.gpu):
            continue
        base = literal_loop(bench, case, name)
        bench.row(f"{name}: literal loop, float32", _speed(base, case.batch), ratio=1.0)
        for way in {"ce+kd": WAYS[3:4], "ce+dkd+vrm": ways[:4]}.get(name, ways):
            with bench.trying(f"{name}: {way.label}"):
                if way.precision == "tf32" and "tf32" not in _precisions():
                    raise NotThere("precision tf32")
                spent, first, _ = ours(bench, case, objective(*terms), way)
                fastest = way is ways[0]
                goal = goals.get(name) if fastest else None
                bench.row(
                    f"{name}: {way.label}" + (f" (first {first:.0f} s)" if first > 5 else ""),
                    _speed(spent, case.batch),
                    ratio=base / spent,
                    goal=f">={goal}x" if goal and bench.gpu else "",
                    ok=base / spent >= goal if goal and bench.gpu else None,
                )


def compiled(bench: Bench) -> None:
    """The same with compiled networks."""
    if not bench.gpu:
        raise NotThere("a compiler is slow and not what a CPU is tested for")
    central(bench, COMPILED)


def _precisions() -> Sequence[str]:
    return tuple(trainer.DTYPES)


def _speed(seconds: float, batch: int) -> str:
    return f"{1e3 * seconds:.2f} ms {batch / seconds:,.0f} img/s"


# -- whether fast and slow are the same -----------------------------------------------------


def right(bench: Bench) -> None:
    """Graphs against plain steps, literal values, a GPU's losses against a CPU's."""
    with exactly():
        _literal_values(bench)
        _curves(bench)
        _not_finite(bench)
        _every_loss(bench)


def _literal_values(bench: Bench) -> None:
    size, classes = 16, 10
    draw = torch.Generator().manual_seed(0)
    a, b, d, e = torch.randn(4, size, classes, generator=draw).to(bench.device).unbind()
    b, e = a + 0.5 * b, d + 0.5 * e
    targets = torch.arange(size, device=bench.device) % classes
    vrm, dkd = LOSSES.create("vrm"), LOSSES.create("dkd", beta=8.0)
    from fedkd.losses.dkd import dkd_loss
    from fedkd.losses.vrm import vrm_loss

    for name, value in (
        ("ce+dkd", dkd_loss(a, d, targets, **vars(dkd.options)).mean()),
        (
            "ce+dkd+vrm",
            dkd_loss(a, d, targets, **vars(dkd.options)).mean()
            + vrm_loss(a, b, d, e, **vars(vrm.options)),
        ),
    ):
        written = literal_loss(name, (a, b), (d, e), targets) - F.cross_entropy(a, targets)
        error = abs(float(value) / float(written) - 1)
        bench.check(f"{name}: value, literal formula", off=(error, 2e-3))


def _curves(bench: Bench) -> None:
    """Graph and eager, from the same seed: odd last batch, terms that come and go, schedules."""
    odd = 3
    if bench.gpu:
        count, batch, pair = 64 * 6 + odd, 64, ("resnet20", "resnet8")
    else:
        count, batch, pair = 8 * 2 + odd, 8, ("cnn_tiny", "cnn_tiny")
    images = patterns(count, 10)
    teacher = network(pair[0], images, 0, bench.device)
    fit(teacher, images, epochs=1, batch_size=batch, optimizer=SGD, seed=0)
    teacher.eval()
    start = network(pair[1], images, 9, bench.device)
    times = {"dkd": {"warmup": 2}, "vrm": {"start": 2, "stop": 3}, "fitnet": {"decay_from": 2}}
    cases: list[tuple[str, list[Any], dict[str, Any], Optimizer, str]] = [
        ("ce+dkd", [*DKD], {}, SGD, "none"),
        (
            "warmup, start, stop, cosine",
            [*DKD, "fitnet"],
            times | {"fitnet": {"start": 2, "stop": 3}},
            Optimizer(name="sgd", lr=0.05, schedule="cosine", warmup=0.1, max_grad_norm=5.0),
            "none",
        ),
        ("adamw, step schedule, decay", [*DKD, "fitnet"], times, Optimizer(name="adamw", lr=1e-3,
            schedule="step"), "none"),
        ("crop_flip and a virtual view", [*DKD_VRM], times, SGD, "crop_flip"),
    ]  # fmt: skip
    for label, terms, when, optimizer, augment in cases if bench.gpu else cases[1::2]:
        with bench.trying(f"graph = eager: {label}"):
            found = {}
            for graphs in (False, True):
                student = copy.deepcopy(start)
                losses = objective(*terms, **when)
                batches = OnlineBatches(
                    images,
                    [teacher],
                    losses.needs,
                    augment=augment,
                    virtual="none" if augment == "none" else "randaugment_flip",
                    batch_size=batch,
                    device=bench.device,
                )
                history, _ = epochs_of(
                    bench, student, batches, losses, 4, optimizer=optimizer, **switched(graphs)
                )
                found[len(found)] = history, student
            (slow, one), (fast, other) = found.values()
            gaps = [abs(f.loss / s.loss - 1) for f, s in zip(fast, slow, strict=True)]
            bench.check(
                f"graph = eager: {label}",
                loss=(max(gaps), 1e-3),
                weights=(apart(one, other, start), 2e-2),
                lr=(max(abs(f.lr - s.lr) for f, s in zip(fast, slow, strict=True)), 0.0),
                terms=(float(any(set(f.terms) != set(s.terms) for f, s in zip(fast, slow))), 0.0),
            )


def _not_finite(bench: Bench) -> None:
    images = patterns(64 if bench.gpu else 16, 10)
    teacher = network("resnet8" if bench.gpu else "cnn_tiny", images, 0, bench.device).eval()
    for graphs in (False, True):
        label = "graph" if graphs else "eager"
        with bench.trying(f"{label}: a loss that is not finite is found"):
            losses = objective(*DKD)
            batches = OnlineBatches(
                images, [teacher], losses.needs, batch_size=8, device=bench.device
            )
            student = network("cnn_tiny", images, 1, bench.device)
            options = switched(graphs)
            try:
                distill(
                    student, batches, losses, epochs=30,
                    optimizer=Optimizer(name="sgd", lr=1e18, schedule="constant"), **options,
                )  # fmt: skip
            except RuntimeError as error:
                text = str(error)
                named = "not finite" in text or "is nan" in text or "is inf" in text
                bench.fact(f"{label}: a loss that is not finite is found", named, text[:60])
            else:
                bench.fact(f"{label}: a loss that is not finite is found", False, "no error")


def _every_loss(bench: Bench) -> None:
    """First-step value of each loss on this device against a CPU's."""
    images = patterns(32 if bench.gpu else 8, 10)
    start = {
        name: network(name, images, seed, "cpu")
        for seed, name in enumerate(("resnet8", "resnet20"))
    }
    worst, odd = 0.0, []
    for name in LOSSES.names() if bench.gpu else ("dkd", "vrm"):
        values: list[float] = []
        try:
            for device in ("cpu", bench.device):
                student = copy.deepcopy(start["resnet8"]).to(device)
                teachers = [copy.deepcopy(start["resnet20"]).to(device).eval()]
                losses = objective(name)
                batches = OnlineBatches(
                    images, teachers, losses.needs, virtual="none", batch_size=len(images),
                    device=device,
                )  # fmt: skip
                history, _ = distill(student, batches, losses, epochs=1, optimizer=SGD)
                values.append(history[0].loss)
        except Exception as error:
            odd.append(f"{name} ({type(error).__name__})")
            if not isinstance(error, ValueError | ImportError):
                bench.problem(f"loss {name}")
            continue
        scale = max(abs(values[0]), 1e-6)
        gap = abs(values[0] - values[1]) / scale
        worst = max(worst, gap)
        if not gap <= 1e-3:
            odd.append(f"{name} {gap:.1e}")
    bench.check("first value of each loss, as on a CPU", off=(worst, 1e-3))
    bench.row("losses that differ", ", ".join(odd)[:90] or "none")


# -- clients as one batch -------------------------------------------------------------------


def many(
    *arguments: Any, graphs: bool = False, precision: str = "float32", **options: Any
) -> list[Fit | Exception]:
    """`fit_many` of all clients together, if there is such a thing."""
    try:
        from fedkd.training.batched import fit_many
    except ImportError:
        raise NotThere("fedkd.training.batched") from None
    known = inspect.signature(fit_many).parameters
    if "together" not in known:
        raise NotThere("fit_many takes one client after the other")
    options |= {"together": True}
    if "graphs" in known:
        options["graphs"] = "on" if graphs else "off"
    elif graphs:
        raise NotThere("fit_many has no argument graphs")
    if precision == "bfloat16":
        options["autocast"] = torch.bfloat16
    found = fit_many(*arguments, **options)
    for one in found:
        if isinstance(one, Exception):
            raise one
    return found


def alone(*arguments: Any, graphs: bool = False, **options: Any) -> Fit:
    """`fit`, with or without graphs."""
    if "graphs" in inspect.signature(fit).parameters:
        options["graphs"] = "on" if graphs else "off"
    elif graphs:
        raise NotThere("fit has no argument graphs")
    return fit(*arguments, **options)


def marginal(bench: Bench, run: Callable[[int], object], short: int, long: int) -> float:
    """Seconds of one more epoch: what long trainings cost, without their beginning."""
    run(short)
    begin = seconds_of(bench, lambda: run(short))
    return (seconds_of(bench, lambda: run(long)) - begin) / (long - short)


def clients(bench: Bench) -> None:
    """Local training of twenty ResNet-8 in batches of 64."""
    count, batch = (20, 64) if bench.gpu else (3, 8)
    steps = bench.size(16, 8) if bench.gpu else 2
    few = 5 if bench.gpu else count  # one after the other: twenty take four times as long
    model = "resnet8" if bench.gpu else "cnn_tiny"
    shards = [pixels(batch * steps, 10, seed=k) for k in range(count)]
    for augment in ("none", "crop_flip"):
        options: dict[str, Any] = {"batch_size": batch, "optimizer": SGD, "augment": augment}

        start = [network(model, shards[0], k, bench.device) for k in range(count)]

        def fresh(start: list[Network] = start) -> list[Network]:
            return copy.deepcopy(start)

        def one_by_one(
            epochs: int, options: dict[str, Any] = options, graphs: bool = False
        ) -> None:
            for k, net in enumerate(fresh()[:few]):
                alone(net, shards[k], epochs=epochs, seed=k, graphs=graphs, **options)

        base = marginal(bench, one_by_one, 1, 2) / steps * count / few
        text = f"{1e3 * base:.1f} ms {count * batch / base:,.0f} img/s"
        bench.row(f"{count} {model}, {augment}: one by one, float32", text, ratio=1.0)
        for label, more in (
            ("together, graph, bfloat16", {"graphs": True, "precision": "bfloat16"}),
            ("together, graph, float32", {"graphs": True}),
            ("together, float32", {"graphs": False}),
        ):
            if augment != "none" and label != "together, graph, bfloat16":
                continue
            with bench.trying(f"{augment}: {label}"):

                def together(epochs: int, more: dict[str, Any] = more) -> None:
                    nets = fresh()
                    many(nets, shards, seeds=range(count), epochs=epochs, **options, **more)  # noqa: B023

                spent = marginal(bench, together, *((4, 16) if bench.gpu else (1, 2))) / steps
                last = label.endswith("graph, bfloat16") and augment == "none"
                bench.row(
                    f"{augment}: {label}",
                    f"{1e3 * spent:.1f} ms {count * batch / spent:,.0f} img/s",
                    ratio=base / spent,
                    goal=">=10x" if last else "",
                    ok=base / spent >= 10 if last and bench.gpu else None,
                )
        if augment == "none":
            with bench.trying("one by one, graph, float32"):
                spent = marginal(bench, lambda n: one_by_one(n, graphs=True), 2, 12)
                spent *= count / few / steps
                text = f"{1e3 * spent:.1f} ms {count * batch / spent:,.0f} img/s"
                bench.row("none: one by one, graph, float32", text, ratio=base / spent)
    with bench.trying("answers of all clients"):
        count_of = 10_000 if bench.gpu else 20
        images = pixels(count_of, 10).images
        nets = [network(model, shards[0], k, bench.device) for k in range(count)]
        answers: dict[bool, list[Any]] = {}

        def read(together: bool) -> None:
            answers[together] = extract_many(nets, images, (Logits(),), together=together)

        for together in (False, True):
            read(together)
        spent = [seconds_of(bench, lambda way=way: read(way)) for way in (False, True)]
        bench.row(
            f"answers of all about {count_of:,} images: alone / together",
            f"{spent[0]:.2f} / {spent[1]:.2f} s",
            ratio=spent[0] / spent[1],
        )
        pairs = zip(answers[False], answers[True], strict=True)
        gaps = [float((a[Logits()] - b[Logits()]).norm() / a[Logits()].norm()) for a, b in pairs]
        bench.check("answers together = alone", off=(max(gaps), 2e-2))
    with bench.trying("together against one by one"):
        _clients_agree(bench)


def _clients_agree(bench: Bench) -> None:
    """The same weights and losses, clients of unequal size included."""
    model = "resnet8" if bench.gpu else "cnn_tiny"
    batch = 32 if bench.gpu else 8
    sizes = (5 * batch + 3, 2 * batch, batch // 2, 3 * batch - 1)
    shards = [patterns(size, 10, seed=k) for k, size in enumerate(sizes)]
    ways: list[tuple[str, dict[str, Any]]] = [(", graph", {"graphs": True})]
    with exactly():
        start = [network(model, shards[0], k, bench.device) for k in range(len(sizes))]
        for augment in ("none", "randaugment_flip" if bench.gpu else "crop_flip"):
            single = copy.deepcopy(start)
            options: dict[str, Any] = {
                "epochs": 2, "batch_size": batch, "optimizer": SGD, "augment": augment,
            }  # fmt: skip
            fits = [
                alone(net, shard, seed=k, **options)
                for k, (net, shard) in enumerate(zip(single, shards, strict=True))
            ]
            for label, more in ways:
                with bench.trying(f"unequal clients, {augment}{label}"):
                    nets = copy.deepcopy(start)
                    found = many(nets, shards, seeds=range(len(sizes)), **options, **more)
                    gap = max(
                        apart(a, b, s) for a, b, s in zip(single, nets, start, strict=True)
                    )  # fmt: skip
                    losses = max(
                        abs(one.loss / other.loss - 1)
                        for one, other in zip(fits, found, strict=True)
                        if isinstance(other, Fit)
                    )
                    state = max(_buffers_apart(a, b) for a, b in zip(single, nets, strict=True))
                    bench.check(
                        f"together = alone: unequal clients, {augment}{label}",
                        weights=(gap, 5e-2),
                        loss=(losses, 2e-2),
                        norm=(state, 5e-2),
                    )


def _buffers_apart(first: Network, second: Network) -> float:
    gaps = [0.0]
    for (name, a), b in zip(first.body.named_buffers(), second.body.buffers(), strict=True):
        if "num_batches" in name:
            gaps.append(float(abs(int(a) - int(b))))
        else:
            gaps.append(float((a.cpu() - b.cpu()).norm() / a.cpu().norm().clamp(min=1e-6)))
    return max(gaps)


# -- augmentation and losses ----------------------------------------------------------------


def views(bench: Bench) -> None:
    """Augmentation of a batch on the device, by itself and as a graph."""
    device = torch.device(bench.device)
    for count in (64, 1280) if bench.gpu else (8,):
        images = pixels(count, 10).images.to(device)
        for recipe in ("crop_flip", "randaugment", "randaugment_flip"):
            with bench.trying(f"{recipe}, batch of {count}"):
                generator = Draws(0, device).of(1, 1, "augment")

                def change(images: Tensor, recipe: str = recipe) -> Tensor:
                    return augmented(images, recipe, generator)  # noqa: B023

                plain = typical(bench, lambda: change(images), 20 if bench.gpu else 1)  # noqa: B023
                step = Captured(change, device, "on", generators=[generator])
                for _ in range(4):
                    step(images)
                spent = typical(bench, lambda: step(images), 20 if bench.gpu else 1)  # noqa: B023
                small = bench.gpu and count == 64
                bench.row(
                    f"{recipe}, batch of {count}: eager / graph",
                    f"{1e3 * plain:.3f} / {1e3 * spent:.3f} ms",
                    goal="<1 ms" if small else "",
                    ok=spent < 1e-3 if small else None,
                )


def losses(bench: Bench) -> None:
    """Forward and backward of each loss, eager and as a graph."""
    classes = 100 if bench.gpu else 10
    images = pixels(64 if bench.gpu else 8, classes)
    pair = ("resnet32x4", "resnet8x4") if bench.gpu else ("resnet8", "resnet8")
    teacher = network(pair[0], images, 0, bench.device).eval()
    student = network(pair[1], images, 1, bench.device).train()
    repeats = bench.size(20, 1)
    lines = []
    for name in LOSSES.names():
        try:
            lines.append(_one_loss(bench, name, images, teacher, student, repeats))
        except Exception as error:
            lines.append(f"{name} {type(error).__name__}")
            if not isinstance(error, ValueError | ImportError):
                bench.problem(f"loss {name}")
                bench.usable()
    for at in range(0, len(lines), 3):
        bench.row(" | ".join(lines[at : at + 3]), "eager/graph ms" if bench.gpu else "ms")


def _one_loss(
    bench: Bench, name: str, images: ImageSet, teacher: Network, student: Network, repeats: int
) -> str:
    value = objective(name)
    batches = OnlineBatches(
        images, [teacher], value.needs, virtual="flip", batch_size=len(images), device=bench.device
    )
    batch = next(iter(batches.epoch(1)))
    value.to(bench.device)
    with torch.no_grad():
        readings = batch.read(student, value.reads)
    value.adapt(readings, batch.ensemble, 0)
    given = {kind: t.detach().float().clone().requires_grad_() for kind, t in readings.items()}
    own = [p for p in value.parameters() if p.requires_grad]
    inputs = [*given.values(), *own]

    def step() -> tuple[Tensor | None, ...]:
        total = value(given, batch.ensemble, batch.targets, 1, 1).total
        found: tuple[Tensor | None, ...] = torch.autograd.grad(total, inputs, allow_unused=True)
        return found

    eager = typical(bench, step, repeats, groups=3)
    if not bench.gpu:
        return f"{name} {1e3 * eager:.2f}"
    try:
        replay = captured(step)
        graphed = f"{1e3 * typical(bench, replay, repeats, groups=3):.3f}"
    except Exception:
        bench.problem(f"loss {name} as a graph")
        bench.usable()
        graphed = "no graph"
    return f"{name} {1e3 * eager:.2f}/{graphed}"


def captured(step: Callable[[], object]) -> Callable[[], None]:
    """A function of no arguments as one CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = step()

    def replay(_kept: object = kept) -> None:
        graph.replay()

    return replay


# -- a federation without Flower ------------------------------------------------------------


def quickstart(bench: Bench) -> None:
    """The quickstart's three rounds with the library's functions: digits, eight clients."""
    tiny = not bench.gpu
    try:
        train, test = load_dataset("digits")
    except ImportError:
        raise NotThere("scikit-learn's digits") from None
    data = federate(
        train, test, clients=8, partition="dirichlet",
        partition_options={"alpha": 0.3, "min_size": 10}, transfer_size=400, seed=0,
    )  # fmt: skip
    transfer = data.transfer.images
    models = ("cnn_tiny", "mlp", "resnet8", "mixer")
    recipe = Optimizer(name="adamw", lr=0.003, weight_decay=0.01)
    for label in ("one by one", "together", "together, kernels not tried out"):
        together, graphs = label != "one by one", True
        rounds = (1,) if tiny else (1, 2, 3)
        with bench.trying(f"clients {label}"), _tried("not" not in label):
            if together:
                many([], [], seeds=[])
            shards = [data.shard(k) for k in range(8)]
            nets = [network(models[k % 4], transfer, 100 + k, bench.device) for k in range(8)]
            student = network("cnn_small", transfer, 99, bench.device)
            state, parts = None, {"train": 0.0, "answer": 0.0, "fuse": 0.0, "distil": 0.0}
            for number in rounds:
                seeds = [stream_seed(0, "teach", k, number) for k in range(8)]
                options: dict[str, Any] = {
                    "epochs": 1 if tiny else 10, "batch_size": 16, "optimizer": recipe,
                    "label_smoothing": 0.1,
                }  # fmt: skip

                def teach(seeds: list[int] = seeds, options: dict[str, Any] = options) -> None:
                    if together:  # noqa: B023
                        by_model(nets, shards, seeds, models, options | {"graphs": graphs})  # noqa: B023
                        return
                    for net, shard, seed in zip(nets, shards, seeds, strict=True):  # noqa: B023
                        alone(net, shard, seed=seed, graphs=graphs, **options)  # noqa: B023

                parts["train"] += seconds_of(bench, teach)
                terms = objective(
                    ("dkd", {"alpha": 1.0, "beta": 2.0, "temperature": 2.0}), "vrm"
                )  # fmt: skip
                begin = time.perf_counter()
                drawn: dict[int, Tensor] = {}

                def view(
                    one: int, drawn: dict[int, Tensor] = drawn, number: int = number
                ) -> Tensor:
                    if one not in drawn:
                        seed = stream_seed(0, number)
                        drawn[one] = virtual_view(transfer.images, seed=seed, view=one)
                    return drawn[one]

                rules = [FUSIONS.create("density_ratio")]
                kinds = tuple(
                    dict.fromkeys((*terms.needs, *(kind for r in rules for kind in r.needs)))
                )
                owns = [shard.images for shard in shards]
                read = extract_many(
                    nets, transfer.images, kinds, views=view, owns=owns, together=together
                )
                knowledge = []
                for k, (answers, shard) in enumerate(zip(read, shards, strict=True)):
                    who = Teacher(k, len(shard), tuple(shard.class_counts().tolist()))
                    knowledge.append(Knowledge(who, answers))
                parts["answer"] += time.perf_counter() - begin
                begin = time.perf_counter()
                bank = Bank.of(knowledge)
                fused = fuse(bank, fit_rules(rules, FitContext(bank)))
                parts["fuse"] += time.perf_counter() - begin
                batches = TransferBatches(
                    transfer.images, fused, views=view, batch_size=32, seed=number,
                    device=bench.device,
                )  # fmt: skip
                begin = time.perf_counter()
                options = {"optimizer": recipe, "seed": number, "trainer_state": state}
                options |= switched(graphs)
                _, state = distill(student, batches, terms, epochs=2 if tiny else 30, **options)
                sync(bench)
                parts["distil"] += time.perf_counter() - begin
            total, accuracy = sum(parts.values()), evaluate(student, data.test)
            spent = ", ".join(f"{name} {value:.1f}" for name, value in parts.items())
            bench.row(
                f"clients {label}: {spent} s",
                f"{total:.1f} s, {accuracy:.1%}",
                goal="<=12 s" if graphs and bench.gpu else "",
                ok=total <= 12 if graphs and bench.gpu else None,
            )
            if bench.gpu and graphs:
                bench.check(f"clients {label}: accuracy", below_94=(0.94 - accuracy, 0.02))


@contextlib.contextmanager
def _tried(on: bool) -> Iterator[None]:
    """Whether several kernels of each convolution are tried, and the fastest is kept."""
    numerics = batched.numerics

    def given(*arguments: Any, **_options: Any) -> Any:
        return numerics(*arguments, autotune=on)

    with mock.patch.object(batched, "numerics", given):
        yield


def by_model(
    nets: Sequence[Network],
    shards: Sequence[ImageSet],
    seeds: Sequence[int],
    models: Sequence[str],
    options: dict[str, Any],
) -> None:
    """Clients of one architecture together."""
    for first in range(len(models)):
        group = range(first, len(nets), len(models))
        many([nets[k] for k in group], [shards[k] for k in group],
             seeds=[seeds[k] for k in group], **options)  # fmt: skip


# -- the server -----------------------------------------------------------------------------


def fusion(bench: Bench) -> None:
    """Fusion of a hundred teachers' answers about 50,000 images of 100 classes."""
    teachers, count, classes = (100, 50_000, 100) if bench.gpu else (5, 200, 10)
    if bench.gpu and bench.minutes < 4:
        count //= 5
    arrays = []
    for number in range(teachers):
        draw = torch.Generator(bench.device).manual_seed(number)
        logits = torch.randn(count, classes, device=bench.device, generator=draw)
        arrays.append(logits.cpu().numpy())
    bank = Bank(tuple(Teacher(number) for number in range(teachers)), {Logits(): arrays})
    size = f"{teachers} x {count:,} x {classes}"
    known = inspect.signature(fuse).parameters
    ways: list[tuple[str, dict[str, Any]]] = [("on the CPU", {})]
    if bench.gpu and "device" in known:
        ways.insert(0, ("on the GPU", {"device": "cuda"}))
    kept: dict[str, dict[str, Tensor]] = {}
    for label, options in ways:
        for rule in ("uniform", "entropy"):
            with bench.trying(f"{rule} {label}"):
                before = torch.cuda.memory_allocated() if bench.gpu else 0
                if bench.gpu:
                    torch.cuda.reset_peak_memory_stats()
                rules = [FUSIONS.create(rule)]
                found: list[Any] = []
                spent = seconds_of(bench, lambda: found.append(fuse(bank, rules, **options)))  # noqa: B023
                most = torch.cuda.max_memory_allocated() if bench.gpu else 0
                peak = (most - before) / 2**30
                goal = "GPU" in label
                bench.row(
                    f"{rule}, {size}, {label}",
                    f"{spent:.2f} s, GPU {peak:.2f} GiB",
                    goal="<2 s,2 GB" if goal else "",
                    ok=spent < 2 and peak < 2 if goal else None,
                )
                kept.setdefault(rule, {})[label] = found[0].probabilities.cpu()
    for rule, results in kept.items():
        if len(results) == 2:
            one, other = results.values()
            bench.check(f"{rule}: GPU = CPU", off=(float((one - other).abs().max()), 1e-5))
    if len(ways) == 1 and bench.gpu:
        bench.row("on the GPU", "not there: fuse has no argument device")


def feddf(bench: Bench) -> None:
    """A cell of FedDF's Table 2, projected: 100 rounds, 8 of 20 clients, 40 epochs, ResNet-8."""
    total, batch, model = (50_000, 64, "resnet8") if bench.gpu else (200, 16, "cnn_tiny")
    images = pixels(total, 10)
    assert images.labels is not None
    for alpha in (1.0, 0.1):
        with bench.trying(f"alpha {alpha:g}"):
            parts = partition(
                "dirichlet", images.labels.numpy(), 20, seed=0, alpha=alpha, min_size=2
            )
            shards = [images.subset(torch.from_numpy(rows)) for rows in parts[:8]]

            start = [network(model, images, k, bench.device) for k in range(len(shards))]

            def together(
                epochs: int,
                shards: list[ImageSet] = shards,
                start: list[Network] = start,
                precision: str = "float32",
            ) -> None:
                nets = copy.deepcopy(start)
                many(
                    nets, shards, seeds=range(len(shards)), epochs=epochs, batch_size=batch,
                    optimizer=SGD, augment="crop_flip", graphs=True, precision=precision,
                )  # fmt: skip

            share = sum(len(shard) for shard in shards)
            # A round as it is, captures included: each begins with networks of its own.
            epochs = 40 if bench.gpu else 2
            for precision in ("float32", "bfloat16") if alpha == 1 else ("float32",):
                together(1, precision=precision)
                seconds = seconds_of(
                    bench, functools.partial(together, epochs, precision=precision)
                )
                minutes = 100 * seconds * 40 / epochs / 60
                bench.row(
                    f"alpha {alpha:g}, {precision}: {share:,} images, a round {seconds:.1f} s",
                    f"{minutes:.1f} min, {epochs * share / seconds:,.0f} img/s",
                    goal="<10 min" if bench.gpu else "",
                    ok=minutes < 10 if bench.gpu else None,
                )


# -- privacy and determinism ----------------------------------------------------------------


def private(bench: Bench) -> None:
    """DP-SGD of several clients, one by one and together."""
    count, size = (20, 500) if bench.gpu else (2, 24)
    model = "cnn_small" if bench.gpu else "cnn_tiny"
    shards = [patterns(size, 10, seed=k) for k in range(count)]
    mechanism = Mechanism.of(size, 64 if bench.gpu else 8, 1, 1.0)

    def fresh() -> list[Network]:
        return [network(model, shards[0], k, bench.device) for k in range(count)]

    base = float("nan")
    with bench.trying("one by one"):
        try:
            import opacus  # noqa: F401
        except ImportError:
            raise NotThere("Opacus, which clips the gradients of single images") from None
        base = seconds_of(
            bench,
            lambda: [
                fit_private(net, shards[k], mechanism, optimizer=SGD, seed=k, noise_seed=k)
                for k, net in enumerate(fresh())
            ],
        )
        bench.row(f"{count} {model}, {mechanism.steps} steps: one by one", f"{base:.2f} s")
    with bench.trying("together"):
        if not hasattr(dp_sgd, "fit_private_many"):
            raise NotThere("DP-SGD of several clients together")

        def together() -> None:
            found = dp_sgd.fit_private_many(
                fresh(), shards, mechanism, optimizer=SGD, seeds=list(range(count)),
                noise_seeds=list(range(count)), together=True,
            )  # fmt: skip
            for error in found:
                if error is not None:
                    raise error

        with _cipher():
            if bench.gpu:
                together()
            spent = seconds_of(bench, together)
        step = f"{spent:.2f} s, {1e3 * spent / mechanism.steps:.0f} ms/step"
        ratio = None if base != base else base / spent
        bench.row(f"{count} {model}, {mechanism.steps} steps: together", step, ratio=ratio)


class _Stream:
    """A key stream for machines without the cipher: as fast, and no secret."""

    def __init__(self, seed: int | None) -> None:
        self._numbers = np.random.default_rng(seed)

    def update(self, zeros: bytes) -> bytes:
        """As many bytes."""
        return self._numbers.bytes(len(zeros))


def _cipher() -> contextlib.AbstractContextManager[object]:
    """The noise of DP-SGD, made by something else where there is no cryptography: for its time."""
    if importlib.util.find_spec("cryptography") is not None:
        return contextlib.nullcontext()

    def begin(self: SecureGenerator, seed: int | None = None) -> None:
        self._stream = _Stream(seed)  # type: ignore[assignment]
        self._words = self._one_by_one()

    return mock.patch.object(SecureGenerator, "__init__", begin)


def same(bench: Bench) -> None:
    """The same seed twice, as it is and on request deterministic, and what that costs."""
    case = Central.of(bench)
    spent = {}
    for label, strict in (("as it is", False), ("deterministic", True)):
        for graphs in (True, False) if bench.gpu else (True,):
            what = f"{label}, {'graph' if graphs else 'eager'}"
            with bench.trying(what):
                hashes, times = [], []
                for _ in range(2):
                    with deterministic(strict):
                        student = _trained(bench, case, graphs, times)
                    hashes.append(_hash(student))
                spent[label, graphs] = min(times)
                equal = hashes[0] == hashes[1]
                text = f"{1e3 * min(times):.2f} ms a step, {'same' if equal else 'other'} hash"
                if strict:
                    bench.fact(f"{what}: twice the same student", equal, text)
                    plain = spent.get((False, graphs)) or spent.get(("as it is", graphs))
                    if plain:
                        bench.row(f"{what}: cost", "", ratio=min(times) / plain)
                else:
                    bench.row(f"{what}: twice", text)


def _trained(bench: Bench, case: Central, graphs: bool, times: list[float]) -> Network:
    terms = objective(*DKD_VRM)
    images = case.few
    teacher = network(case.teacher, images, 0, bench.device).eval()
    student = network(case.student, images, 9, bench.device)
    batches = OnlineBatches(
        images, [teacher], terms.needs, augment="crop_flip", virtual="randaugment_flip",
        batch_size=case.batch, device=bench.device,
    )  # fmt: skip
    _, spent = epochs_of(bench, student, batches, terms, 2, **switched(graphs))
    times.append(spent[-1] / batches.steps)
    return student


def _hash(net: nn.Module) -> str:
    digest = hashlib.sha256()
    for tensor in net.state_dict().values():
        digest.update(np.ascontiguousarray(tensor.detach().cpu().numpy()).tobytes())
    return digest.hexdigest()


def waits(bench: Bench) -> None:
    """How often an epoch waits for the device."""
    if not bench.gpu:
        raise NotThere("a CPU waits for itself")
    case = Central.of(bench)
    for graphs in (False, True):
        with bench.trying(f"distill, {'graph' if graphs else 'eager'}"):
            counted: list[int] = []
            places: dict[str, int] = {}
            terms = objective(*DKD_VRM)
            teacher = network(case.teacher, case.images, 0, bench.device).eval()
            student = network(case.student, case.images, 9, bench.device)
            batches = OnlineBatches(
                case.few, [teacher], terms.needs, augment="crop_flip",
                virtual="randaugment_flip", batch_size=case.batch, device=bench.device,
            )  # fmt: skip
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")

                def on_epoch(
                    record: EpochRecord, _snapshot: object, caught: list[Any] = caught
                ) -> None:
                    counted.append(len(caught))  # noqa: B023
                    if record.epoch == 1:
                        torch.cuda.set_sync_debug_mode("warn")

                try:
                    distill(
                        student, batches, terms, epochs=3, optimizer=SGD, on_epoch=on_epoch,
                        **switched(graphs),
                    )  # fmt: skip
                finally:
                    torch.cuda.set_sync_debug_mode("default")
                for one in caught[counted[1] : counted[2]]:
                    if "synchronizing CUDA operation" in str(one.message):
                        key = f"{one.filename.rsplit('/', 2)[-1]}:{one.lineno}"
                        places[key] = places.get(key, 0) + 1
            total = sum(places.values())
            most = sorted(places.items(), key=lambda item: -item[1])[:3]
            bench.row(
                f"distill, {'graph' if graphs else 'eager'}: waits in an epoch of "
                f"{batches.steps} steps",
                f"{total}: " + ", ".join(f"{key} {n}" for key, n in most),
                goal="<=10",
                ok=total <= 10,
            )


def paper(bench: Bench) -> None:
    """The script for papers' numbers, with tiny networks: in one call, and in pieces."""
    if not bench.gpu:
        raise NotThere("a test of its own sees to that")
    found = []
    for minutes in ("5", "0"):
        with tempfile.TemporaryDirectory() as folder:
            words = ["--tiny", "--state", folder, "--minutes", minutes]
            words += ["--only", "teacher,dkd+cat+vrm,feddf-1,fedkd-1"]
            code, calls, begin = papers.MORE, 0, time.perf_counter()
            with contextlib.redirect_stdout(io.StringIO()):
                while code == papers.MORE:
                    code, calls = papers.main(words), calls + 1
            bench.fact(
                f"papers.py --tiny in {calls} calls",
                code == 0,
                f"exit {code}, {time.perf_counter() - begin:.0f} s",
            )
            for failed in Path(folder).glob("*/failed.txt"):
                bench.log.open("a").write(f"== {failed.parent.name}\n{failed.read_text()}\n")
            weights = torch.load(Path(folder) / "teacher-seed0" / "weights.pt", weights_only=True)
            found.append(torch.cat([t.double().flatten() for t in weights.values()]))
    off = float((found[0] - found[1]).norm() / found[0].norm())
    bench.check("a teacher in pieces = in one", weights=(off, 5e-2))


@dataclass(frozen=True)
class Part:
    """A part, and its share of the time."""

    run: Callable[[Bench], None]
    share: float


PARTS = {
    "central": Part(central, 3.0),
    "clients": Part(clients, 3.0),
    "quick": Part(quickstart, 3.0),
    "feddf": Part(feddf, 2.0),
    "fusion": Part(fusion, 1.0),
    "same": Part(same, 1.5),
    "views": Part(views, 0.5),
    "right": Part(right, 1.5),
    "compiled": Part(compiled, 4.0),
    "losses": Part(losses, 0.7),
    "private": Part(private, 0.7),
    "waits": Part(waits, 0.6),
    "papers": Part(paper, 1.0),
}
