"""Numbers of papers, on one GPU, in pieces of minutes: CIFAR-100's benchmark and FedDF's cells.

    python3 benchmarks/papers.py --data FOLDER [--state papers] [--minutes 8] [--only dkd,feddf-1]

FOLDER holds `cifar100.npz` and `cifar10.npz` (x_train (50000, 32, 32, 3) uint8, y_train, x_test,
y_test). Call it again and again: each call goes on where the last one ended, also after a crash,
and prints the table so far. Exit code: 0 all is done, 3 more is left, 1 something failed (its
traceback is in the state's folder; remove `failed.txt` there to try it again).

Needs python3, torch, torchvision and numpy. `--tiny` takes seconds and no data: a test of itself.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from fedkd.data.datasets import load_dataset
from fedkd.data.images import ImageSet
from fedkd.data.splits import FederatedData, federate
from fedkd.data.views import virtual_view
from fedkd.distillation.batches import OnlineBatches, TransferBatches
from fedkd.distillation.objective import Objective, Term
from fedkd.distillation.trainer import DTYPES, EpochRecord, Snapshot, distill
from fedkd.fusion import FUSIONS
from fedkd.fusion.base import FitContext, fit_rules
from fedkd.knowledge.extract import extract, extract_many
from fedkd.knowledge.payload import AGGREGATE, Bank, Fused, Knowledge, Teacher, fuse
from fedkd.losses import LOSSES
from fedkd.models.build import build_model
from fedkd.models.network import Network
from fedkd.randomness import stream, stream_seed
from fedkd.training.batched import fit_many
from fedkd.training.evaluation import predict, predict_many
from fedkd.training.optimizers import Optimizer
from fedkd.training.supervised import Fit

MORE = 3  # exit code: call again

CRD = "CRD (ICLR 2020)"
PUBLISHED: dict[str, tuple[str, str]] = {
    # Name -> top-1 in percent, and where it is from (all resnet32x4 to resnet8x4).
    "teacher": ("79.42", CRD),
    "student": ("72.50", CRD),
    "kd": ("73.33", CRD),
    "dkd": ("76.32", "DKD (CVPR 2022)"),
    "cat": ("76.91", "CAT-KD (CVPR 2023)"),
    "wkd": ("77.28", "WKD (NeurIPS 2024), both parts"),
    "vrm": ("", "VRM (ICCV 2025); its weights are not published, ours are used"),
    "dkd+cat+vrm": ("", "ours"),
    "feddf-1": ("80.69 ± 0.43", "FedDF (NeurIPS 2020), Table 2, batch norm"),
    "fedkd-1": ("", "ours, beside it"),
    "feddf-0.1": ("71.36 ± 1.07", "FedDF (NeurIPS 2020), Table 2, batch norm"),
    "fedkd-0.1": ("", "ours, beside it"),
}
# Methods with their published options; see configs/distill/cifar100.
METHODS: dict[str, list[dict[str, Any]]] = {
    "teacher": [{"name": "ce"}],
    "student": [{"name": "ce"}],
    "kd": [{"name": "ce", "weight": 0.1}, {"name": "kd", "weight": 0.9, "temperature": 4.0}],
    "dkd": [{"name": "ce"}, {"name": "dkd", "beta": 8.0, "temperature": 4.0, "warmup": 20}],
    "cat": [{"name": "ce"}, {"name": "cat", "weight": 15.0, "size": 2, "normalise": False}],
    "wkd": [
        {"name": "ce"},
        {
            "name": "wkd_l", "transport_weight": 200.0, "temperature": 8.0, "cost": "features",
            "decay_from": 150,
        },
        {"name": "wkd_f", "weight": 0.08, "mean_weight": 8.0, "grid": 1, "decay_from": 150},
    ],
    "vrm": [{"name": "ce"}, {"name": "vrm", "sample_weight": 64.0, "class_weight": 16.0}],
    "dkd+cat+vrm": [
        {"name": "ce"},
        {"name": "dkd", "beta": 8.0, "temperature": 4.0, "warmup": 20},
        {"name": "cat", "weight": 15.0, "size": 2, "normalise": False},
        {"name": "vrm", "sample_weight": 64.0, "class_weight": 16.0},
    ],
}  # fmt: skip
RECIPE = Optimizer(name="sgd", momentum=0.9, weight_decay=5e-4, schedule="step")
LOCAL = Optimizer(name="sgd", lr=0.1, momentum=0.0, weight_decay=0.0, schedule="constant")
SERVER = Optimizer(name="adam", lr=1e-3, schedule="cosine")
# What a config distils with, and by which rule it weighs the teachers.
OURS: list[dict[str, Any]] = [
    {"name": "ce"},
    {"name": "dkd", "alpha": 1.0, "beta": 0.5, "temperature": 1.0},
    {"name": "vrm", "weight": 0.5},
]
RULE = "density_ratio"


class Paused(Exception):
    """The time of this call is over; what was done is kept."""


@dataclass(frozen=True)
class Size:
    """How much of everything.

    Attributes:
        epochs: Of central training.
        batch: Samples per step of central training.
        lr: Learning rate of central training.
        models: Teacher, student and client.
        rounds: Of a federation.
        clients: All of them.
        part: How many take part in a round.
        local: Epochs of a client in a round.
        transfer: Transfer images.
        server: Epochs of the server in a round.
        save: Seconds between checkpoints.
    """

    epochs: int = 240
    batch: int = 64
    lr: float = 0.05
    models: tuple[str, str, str] = ("resnet32x4", "resnet8x4", "resnet8")
    rounds: int = 100
    clients: int = 20
    part: int = 8
    local: int = 40
    transfer: int = 10_000
    server: int = 20
    save: float = 30.0


TINY = Size(3, 16, 0.005, ("cnn_tiny", "cnn_tiny", "cnn_tiny"), 3, 4, 2, 1, 24, 1, 0.0)


@dataclass
class Call:
    """This call of the script."""

    size: Size
    state: Path
    data: Path | None
    device: str
    precision: str
    seed: int
    ends: float
    fresh: bool = True  # nothing was done yet in this call: one piece is, however long it takes

    def is_late(self, next_piece: float) -> bool:
        """Whether the next piece, of so many seconds, would end too late."""
        return not self.fresh and time.monotonic() + 1.3 * next_piece > self.ends

    def pause_if_late(self, next_piece: float) -> None:
        """Raise `Paused` if it is late."""
        if self.is_late(next_piece):
            raise Paused

    def images(self, name: str) -> tuple[ImageSet, ImageSet]:
        """Training and test images."""
        if self.data is None:
            classes = 10 if name == "cifar10" else 6
            return load_dataset("synthetic", classes=classes, size=8, channels=3, per_class=12)
        return load_dataset(name, self.data)

    def network(self, model: str, like: ImageSet, *names: object) -> Network:
        """A network for such images, its weights drawn by a name."""
        return network(model, like, stream_seed(self.seed, *names), self.device)


def network(model: str, like: ImageSet, seed: int, device: str) -> Network:
    """A network for such images, normalised by their statistics."""
    mean, std = like.statistics()
    return build_model(
        model,
        num_classes=len(like.classes),
        in_channels=like.shape[0],
        image_size=like.side,
        mean=mean,
        std=std,
        seed=seed,
    ).to(device)


def objective(terms: Sequence[dict[str, Any]]) -> Objective:
    """Losses by name, weight, time and options."""
    parts = []
    for given in terms:
        options = dict(given)
        when = {
            key: options.pop(key)
            for key in ("weight", "warmup", "start", "stop", "decay_from")
            if key in options
        }
        name = options.pop("name")
        parts.append(Term(name, LOSSES.create(name, **options), **when))
    return Objective(parts)


def score(network: Network, images: ImageSet) -> float:
    """Accuracy in percent; the network's mode is kept."""
    assert images.labels is not None
    right = predict(network, images.images).argmax(1) == images.labels
    return 100 * float(right.double().mean())


def keep(path: Path, content: Any) -> None:
    """Write a file at once or not at all."""
    draft = path.with_suffix(".draft")
    with draft.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def kept(path: Path) -> Any:
    """What `keep` wrote; None if there is nothing."""
    return torch.load(path, map_location="cpu", weights_only=True) if path.is_file() else None


def finish(folder: Path, scores: Sequence[float], seconds: float, network: Network) -> None:
    """The result of a job, which is not begun again."""
    weights = {name: tensor.cpu() for name, tensor in network.state_dict().items()}
    keep(folder / "weights.pt", weights)
    found = {"last": scores[-1], "best": max(scores), "count": len(scores), "seconds": seconds}
    draft = folder / "result.draft"
    draft.write_text(json.dumps(found))
    draft.replace(folder / "result.json")
    (folder / "checkpoint.pt").unlink(missing_ok=True)


# -- CIFAR-100 ---------------------------------------------------------------------------------


def central(call: Call, folder: Path, method: str) -> None:
    """One network of the benchmark: 240 epochs, crops and mirrors.

    Raises:
        Paused: the time is over.
    """
    size = call.size
    train, test = call.images("cifar100")
    teachers = []
    if method not in ("teacher", "student"):
        weights = kept(call.state / f"teacher-seed{call.seed}" / "weights.pt")
        if weights is None:
            raise RuntimeError("the teacher is not trained yet: run the job `teacher` first")
        teachers = [call.network(size.models[0], train, "teacher").eval()]
        teachers[0].load_state_dict(weights)
    model = size.models[0 if method == "teacher" else 1]
    network = call.network(model, train, "teacher" if method == "teacher" else "student")
    half = DTYPES[call.precision]
    form = torch.contiguous_format if half is None else torch.channels_last
    for each in (network, *teachers):
        each.to(memory_format=form)
    losses = objective(METHODS[method])
    batches = OnlineBatches(
        train,
        teachers,
        losses.needs if teachers else (),
        augment="crop_flip",
        virtual="randaugment_flip",
        batch_size=size.batch,
        seed=stream_seed(call.seed, "batches"),
        device=call.device,
        autocast=half,
        memory_format=form,
    )
    before = kept(folder / "checkpoint.pt") or {"scores": [], "seconds": 0.0, "training": None}
    scores: list[float] = list(before["scores"])
    spent: float = before["seconds"]
    started = saved = last = time.monotonic()

    def on_epoch(_record: EpochRecord, snapshot: Snapshot) -> None:
        nonlocal saved, last
        scores.append(score(network, test))
        now = time.monotonic()
        epoch, last, call.fresh = now - last, now, False
        if len(scores) == size.epochs:
            return
        if now - saved >= size.save or call.is_late(epoch):
            total = spent + now - started
            content = {"scores": scores, "seconds": total, "training": snapshot()}
            keep(folder / "checkpoint.pt", content)
            saved = now
        call.pause_if_late(epoch)

    distill(
        network,
        batches,
        losses,
        epochs=size.epochs,
        optimizer=replace(RECIPE, lr=size.lr),
        resume=before["training"],
        precision=call.precision,
        seed=stream_seed(call.seed, "training"),
        on_epoch=on_epoch,
    )
    finish(folder, scores, spent + time.monotonic() - started, network)


# -- FedDF's cells -----------------------------------------------------------------------------


def federation(call: Call, folder: Path, method: str, alpha: float) -> None:
    """A cell of FedDF's Table 2: CIFAR-10 at the clients, CIFAR-100 to distil on.

    `feddf` averages the clients' weights, then distils their mean logits into that. `fedkd` sends
    no weights up: the student learns from the clients' answers, weighed by `density_ratio`, and is
    what they begin the next round with.

    Raises:
        Paused: the time is over.
    """
    size = call.size
    train, test = call.images("cifar10")
    data = federate(
        train,
        test,
        clients=size.clients,
        partition="dirichlet",
        partition_options={"alpha": alpha, "min_size": 2},
        transfer_size=size.transfer,
        transfer_images=call.images("cifar100")[0],
        seed=call.seed,
    )
    student = call.network(size.models[2], data.transfer.images, "student")
    before = kept(folder / "checkpoint.pt") or {"scores": [], "seconds": 0.0}
    if "student" in before:
        student.load_state_dict(before["student"])
    scores, spent = list(before["scores"]), before["seconds"]
    trainer_state, ratios = before.get("trainer"), before.get("ratios", {})
    started = time.monotonic()
    for number in range(len(scores) + 1, size.rounds + 1):
        begin = time.monotonic()
        order = torch.randperm(size.clients, generator=stream(call.seed, "part", number))
        part = sorted(order[: size.part].tolist())
        nets = [copy.deepcopy(student) for _ in part]
        fits = fit_many(
            nets,
            [data.shard(client) for client in part],
            seeds=[stream_seed(call.seed, "local", client, number) for client in part],
            epochs=size.local,
            batch_size=64,
            optimizer=LOCAL,
            augment="crop_flip",
            autocast=DTYPES[call.precision],
        )
        pairs = list(zip(part, nets, fits, strict=True))
        trained = [(client, net) for client, net, fit in pairs if isinstance(fit, Fit)]
        if not trained:
            raise RuntimeError(f"no client came to an end in round {number}: {fits[0]}")
        if method == "feddf":
            feddf(call, student, data, trained, number)
        else:
            trainer_state = ours(call, student, data, trained, number, trainer_state, ratios)
        scores.append(score(student, test))
        now = time.monotonic()
        call.fresh = False
        if number < size.rounds:
            content = {
                "scores": scores,
                "seconds": spent + now - started,
                "student": {name: tensor.cpu() for name, tensor in student.state_dict().items()},
                "trainer": trainer_state,
                "ratios": ratios,
            }
            keep(folder / "checkpoint.pt", content)
            call.pause_if_late(now - begin)
    finish(folder, scores, spent + time.monotonic() - started, student)


def feddf(
    call: Call,
    student: Network,
    data: FederatedData,
    trained: Sequence[tuple[int, Network]],
    number: int,
) -> None:
    """Average weights by the clients' sizes, then match the softmax of their mean logits."""
    sizes = torch.tensor([float(len(data.shard_rows[client])) for client, _ in trained])
    shares = (sizes / sizes.sum()).tolist()
    mean: dict[str, Tensor] = {}
    for share, (_, net) in zip(shares, trained, strict=True):
        for name, tensor in net.state_dict().items():
            mean[name] = mean.get(name, 0.0) + share * tensor.double()
    student.load_state_dict({name: tensor.float() for name, tensor in mean.items()})
    images = data.transfer.images.images
    logits = predict_many([net for _, net in trained], images).mean(0)
    batches = TransferBatches(
        images,
        Fused.of(AGGREGATE, logits),
        batch_size=128,
        seed=stream_seed(call.seed, "server", number),
        device=call.device,
    )
    losses = objective([{"name": "kd", "temperature": 1.0}])
    distill(student, batches, losses, epochs=call.size.server, optimizer=SERVER)


def ours(
    call: Call,
    student: Network,
    data: FederatedData,
    trained: Sequence[tuple[int, Network]],
    number: int,
    trainer_state: Any,
    ratios: dict[int, dict[str, Tensor]],
) -> Any:
    """Fuse the clients' answers and distil them; returns the trainer's state."""
    images = data.transfer.images.images
    losses = objective(OURS)
    views: Callable[[int], Tensor] = lambda view: _view(call, images, number, view)  # noqa: E731
    rule = FUSIONS.create(RULE)
    knowledge = []
    read = extract_many([net for _, net in trained], images, losses.needs, views=views)
    for (client, net), answers in zip(trained, read, strict=True):
        shard = data.shard(client)
        for kind in rule.needs:  # of the client's images alone: the same in every round
            known = ratios.setdefault(client, {})
            if str(kind) not in known:
                known[str(kind)] = extract(net, images, (kind,), own=shard.images)[kind]
            answers[kind] = known[str(kind)]
        who = Teacher(client, len(shard), tuple(shard.class_counts().tolist()))
        knowledge.append(Knowledge(who, answers))
    bank = Bank.of(knowledge)
    fused = fuse(bank, fit_rules([rule], FitContext(bank)))
    seed = stream_seed(call.seed, "server", number)
    batches = TransferBatches(
        images, fused, views=views, batch_size=128, seed=seed, device=call.device
    )
    _, state = distill(
        student,
        batches,
        losses,
        epochs=call.size.server,
        optimizer=SERVER,
        seed=seed,
        trainer_state=trainer_state,
    )
    return state


_views: dict[tuple[int, int], Tensor] = {}


def _view(call: Call, images: Tensor, number: int, view: int) -> Tensor:
    """A virtual view, drawn once for all clients of a round."""
    if (number, view) not in _views:
        _views.clear()
        seed = stream_seed(call.seed, "views", number)
        _views[number, view] = virtual_view(images, seed=seed, view=view, flip=True)
    return _views[number, view]


# -- all of it -----------------------------------------------------------------------------------


def jobs() -> dict[str, Callable[[Call, Path], None]]:
    """Name -> what is done, in order."""
    found: dict[str, Callable[[Call, Path], None]] = {
        name: lambda call, folder, name=name: central(call, folder, name)  # type: ignore[misc]
        for name in METHODS
    }
    for alpha in (1.0, 0.1):
        for method in ("feddf", "fedkd"):
            found[f"{method}-{alpha:g}"] = lambda call, folder, method=method, alpha=alpha: (  # type: ignore[misc]
                federation(call, folder, method, alpha)
            )
    return found


def table(call: Call, names: Sequence[str]) -> str:
    """Published numbers and ours, so far."""
    lines = ["| job | published | last | best | steps done | minutes | source |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for name in names:
        published, source = PUBLISHED[name]
        folder = call.state / f"{name}-seed{call.seed}"
        done, last, best, minutes = "0", "", "", ""
        total = call.size.epochs if name in METHODS else call.size.rounds
        state = kept(folder / "checkpoint.pt")
        if (folder / "result.json").is_file():
            result = json.loads((folder / "result.json").read_text())
            last, best = f"**{result['last']:.2f}**", f"{result['best']:.2f}"
            done, minutes = f"{result['count']} of {total}", f"{result['seconds'] / 60:.1f}"
        elif state:
            scores = state["scores"]
            last, best, done = (
                f"{scores[-1]:.2f}",
                f"{max(scores):.2f}",
                f"{len(scores)} of {total}",
            )
            minutes = f"{state['seconds'] / 60:.1f}"
        if (folder / "failed.txt").is_file():
            done = "failed"
        lines.append(f"| {name} | {published} | {last} | {best} | {done} | {minutes} | {source} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Do as much as there is time for. Returns the exit code."""
    everything = jobs()
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--data", type=Path, default=Path(), help="folder of the .npz files")
    parser.add_argument("--state", type=Path, default=Path("papers"), help="folder of the state")
    parser.add_argument("--minutes", type=float, default=8.0, help="of this call")
    parser.add_argument("--only", help=f"of {','.join(everything)}; default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", choices=tuple(DTYPES), default="float32")
    parser.add_argument("--tiny", action="store_true", help="seconds, invented data")
    words = parser.parse_args(arguments)
    names = words.only.split(",") if words.only else list(everything)
    if unknown := set(names) - set(everything):
        parser.error(f"--only: unknown {unknown.pop()}; known: {', '.join(everything)}")
    gpu = torch.cuda.is_available()
    if not gpu:
        torch.set_num_threads(1)  # sums in pieces are those of one call
    call = Call(
        TINY if words.tiny else Size(),
        words.state,
        None if words.tiny else words.data,
        "cuda" if gpu else "cpu",
        words.precision,
        words.seed,
        time.monotonic() + 60 * words.minutes,
    )
    code = 0
    for name in names:
        folder = call.state / f"{name}-seed{call.seed}"
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "result.json").is_file():
            continue
        if (folder / "failed.txt").is_file():
            code = 1
            continue
        try:
            call.pause_if_late(0.0)
            everything[name](call, folder)
            print(f"{name}: done", flush=True)
        except Paused:
            code = MORE
            break
        except Exception as error:
            print(f"{name}: failed, {type(error).__name__}: {error}", flush=True)
            (folder / "failed.txt").write_text(traceback.format_exc())
            code = 1
    print(table(call, names))
    return code


if __name__ == "__main__":
    sys.exit(main())
