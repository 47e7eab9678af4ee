"""The Python API checks its arguments before work starts, in one line that begins with the name."""

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fedkd
from fedkd.fusion.uniform import Uniform
from fedkd.losses.kd import KDLoss
from fedkd.losses.rkd import RKDLoss

Call = Callable[[], object]


def images(**options: Any) -> fedkd.ImageSet:
    return fedkd.load_dataset("synthetic", **{"per_class": 4, **options})[0]


SET = images()
COLOUR = images(channels=3)
LARGE = images(size=16)
MORE = images(classes=10)
EMPTY = SET.subset(torch.arange(0))


def net(like: fedkd.ImageSet = SET, model: str | nn.Module = "mlp", seed: int = 0) -> fedkd.Network:
    return fedkd.network(model, like, seed=seed)


TEACHER = net()
OTHER = net(seed=1)


class Answer(nn.Module):
    """Gives what a function makes of its logits."""

    def __init__(self, change: Callable[[Tensor, bool], Any]) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 4)
        self.change = change

    def forward(self, images: Tensor) -> Any:
        return self.change(self.fc(images.flatten(1)), self.training)


def with_logit(value: float) -> fedkd.Network:
    made = net()
    with torch.no_grad():
        made.body.head.bias[1] = value
    return made


def student(**changes: Any) -> Call:
    """A call of `train_student` with some arguments changed."""
    given: dict[str, Any] = {
        "student": "mlp", "teachers": [TEACHER], "transfer": SET, "losses": ["kd"], "epochs": 1,
    }  # fmt: skip
    given.update(changes)
    return lambda: fedkd.train_student(**given)


def taught(*teachers: Any) -> Call:
    return student(teachers=list(teachers))


def teacher(**changes: Any) -> Call:
    given: dict[str, Any] = {"teacher": TEACHER, "shard": SET, "epochs": 1}
    given.update(changes)
    return lambda: fedkd.train_teacher(**given)


def sharing(network: fedkd.Network) -> nn.Module:
    return nn.Sequential(network.body.trunk, nn.Linear(64, 4))


def evaluate(network: Any, like: Any) -> Call:
    return lambda: fedkd.evaluate(network, like)


def unlike(case: tuple[Call, str]) -> str:
    return case[1]


BAD_NETWORKS: list[tuple[Call, str]] = [
    # which network, what it takes or gives, what is expected
    (taught(net(LARGE)), r"teachers\[0\] \(Perceptron\) takes 1x16x16.* has 1x8x8"),
    (taught(TEACHER, net(LARGE, "cnn_tiny")), r"teachers\[1\] .* takes 1x16x16 images"),
    (taught(net(MORE)), r"teachers\[0\] .* gives logits of 10 .*has 4 classes"),
    (taught(net(COLOUR, "cnn_tiny")), r"teachers\[0\] .* takes 3x8x8.* transfer has 1x8x8"),
    (
        student(teachers=[net(SET, "cnn_tiny")], transfer=COLOUR),
        r"teachers\[0\] .* takes 1x8x8 images, transfer has 3x8x8",
    ),
    (student(student=net(LARGE)), r"student \(Perceptron\) takes 1x16x16 images"),
    (student(student=net(MORE)), r"student .* gives logits of 10 classes"),
    (student(student=nn.Linear(64, 4)), "student: model 'Linear' cannot take 1x8x8 images"),
    (
        student(student=nn.Sequential(nn.Flatten(), nn.Linear(64, 9))),
        r"student: .*expected logits \(2, 4\)",
    ),
    (taught(nn.Linear(9, 4)), r"teachers\[0\]: model 'Linear' cannot take"),
    (teacher(teacher=net(COLOUR)), r"teacher .* takes 3x8x8 images, shard has 1x8x8 ones"),
    (teacher(teacher=net(MORE)), "teacher .* gives logits of 10 classes, shard has 4 classes"),
    (evaluate(net(COLOUR, "cnn_tiny"), SET), "network .* takes 3x8x8 images, images has 1x8x8"),
    (evaluate(net(MORE), SET), "network .* gives logits of 10 classes, images has 4 classes"),
    (lambda: fedkd.network(net(LARGE), SET), "model .* takes 1x16x16 images, like has 1x8x8 ones"),
    # what is no network
    (taught("mlp"), r"teachers\[0\]: 'mlp' is a name, a teacher must"),
    (taught(nn.Linear), r"teachers\[0\]: model: .*got the class Linear; make one"),
    (taught(None), r"teachers\[0\]: model: .*got NoneType"),
    (student(student=None), "student: model: .*got NoneType"),
    (student(student="mlpp"), "student: unknown model 'mlpp'; did you mean 'mlp'"),
    (teacher(teacher="mlp"), r"teacher: .*got 'mlp'; make one with fedkd.network\('mlp', shard\)"),
    (teacher(teacher=nn.Linear(64, 4)), "teacher: expected a fedkd.Network, got Linear; make one"),
    (evaluate(nn.Linear(64, 4), SET), "network: expected a fedkd.Network, got Linear; make one"),
    (lambda: fedkd.network(nn.Linear, SET), "model: .*got the class Linear"),
    (lambda: fedkd.network(TEACHER, SET, hidden=3), "model: a Network takes no options"),
    # answers that cannot teach
    (taught(with_logit(math.nan)), r"teachers\[0\] .* nan or infinite for images"),
    (taught(TEACHER, with_logit(-math.inf)), r"teachers\[1\] .* nan or infinite"),
    (student(student=with_logit(math.nan)), "student .* nan or infinite"),
    (teacher(teacher=with_logit(math.nan)), "teacher .* nan or infinite"),
    (
        student(student=Answer(lambda x, training: (x, x) if training else x)),
        "student .* in training mode gives a tuple",
    ),
    (
        teacher(teacher=net(model=Answer(lambda x, training: {"out": x} if training else x))),
        "teacher .* in training mode gives a dict",
    ),
    (
        student(student=net(model=Answer(lambda x, _: x)).requires_grad_(False)),
        "student .* no parameter that could be trained",
    ),
    # the same thing twice
    (taught(TEACHER, OTHER, TEACHER), r"teachers\[2\]: is the same network as teachers\[0\]"),
    (student(student=TEACHER), r"student: shares parameters with teachers\[0\]"),
    (
        student(student=sharing(OTHER), teachers=[TEACHER, OTHER]),
        r"student: shares parameters with teachers\[1\]",
    ),
]

BAD_ARGUMENTS: list[tuple[Call, str]] = [
    (student(teachers=[]), "teachers: expected a list of trained networks, got an empty one"),
    (student(teachers=iter([])), "teachers: .*an empty one"),
    (student(teachers=TEACHER), "teachers: expected a list of trained networks, got Network"),
    (student(teachers={"a": TEACHER}), "teachers: .*got dict"),
    (student(transfer=SET.images), "transfer: names: there are neither labels nor class names"),
    (student(transfer=EMPTY), "transfer: has no images"),
    (student(losses="kd"), r"losses: expected a list of losses, got 'kd'; write \['kd'\]"),
    (student(losses=[]), "losses: .*an empty one"),
    (student(losses=["kdd"]), r"losses\[0\]: unknown loss 'kdd'; did you mean 'kd'"),
    (student(losses=["kd", KDLoss]), r"losses\[1\]: .*got the class KDLoss; make one"),
    (student(losses=[nn.KLDivLoss()]), r"losses\[0\]: .*got KLDivLoss"),
    (student(losses=[lambda a, b: 0]), r"losses\[0\]: .*got function"),
    (student(losses=[{"name": "kd"}]), r"losses\[0\]: .*got dict"),
    (student(fusion="uniform"), r"fusion: .*write \['uniform'\]"),
    (student(fusion=["unifrm"]), r"fusion\[0\]: unknown fusion 'unifrm'; did you mean"),
    (student(fusion=[Uniform]), r"fusion\[0\]: .*got the class Uniform; make one"),
    (student(fusion=[3]), r"fusion\[0\]: .*got int"),
    (student(fusion=[lambda ensemble: None]), r"fusion\[0\]: expected an Ensemble back .*NoneType"),
    (student(fusion=["class_gated"]), r"shards: fusion\[0\] \(ClassGated\) needs class_counts"),
    (student(fusion=["density_ratio"]), r"shards: fusion\[0\] \(DensityRatio\) needs"),
    (student(shards=[SET, SET]), "shards: expected one per teacher, 1, got 2"),
    (student(shards=SET), "shards: expected a list of image sets, one per teacher, got ImageSet"),
    (student(shards=[]), "shards: .*an empty one"),
    (student(shards=[SET.unlabelled()]), r"shards\[0\]: needs labels"),
    (student(shards=[MORE]), r"shards\[0\]: has other classes than transfer"),
    (student(shards=[LARGE]), r"shards\[0\]: has other images than transfer"),
    (student(on_epoch=3), "on_epoch: expected a function of a record, got int"),
    (student(strength="mild"), "strength: expected one of weak, moderate, strong, got 'mild'"),
    (student(flip=1), "flip: expected True or False, got 1"),
    (student(optimizer={"lr": 0.1}), "optimizer: expected a fedkd.Optimizer.*got dict"),
    (student(optimizer=fedkd.Optimizer), "optimizer: .*got the class Optimizer"),
    (teacher(optimizer=torch.optim.SGD), "optimizer: .*got the class SGD"),
    (teacher(augment="flips"), "augment: expected one of .*got 'flips'; did you mean 'flip'"),
    (teacher(augment=None), "augment: .*got None"),
    (teacher(shard=5), "shard: expected an ImageSet, a map-style torch Dataset"),
    (teacher(shard=SET.unlabelled()), "shard: needs labels"),
    (teacher(shard=EMPTY), "shard: has no images"),
    (evaluate(TEACHER, SET.unlabelled()), "images: needs labels"),
    (evaluate(TEACHER, EMPTY), "images: has no images"),
    (evaluate(TEACHER, SET.images), "images: names: there are neither labels nor class names"),
    (lambda: fedkd.network("mlp", SET.images), "like: names: there are neither labels nor"),
    (lambda: fedkd.network("mlp", EMPTY), "like: has no images"),
]  # fmt: skip


def term(**changes: Any) -> Call:
    return lambda: fedkd.Term(**{"name": "kd", "loss": KDLoss(), **changes})


def objective(*terms: Any) -> Call:
    return lambda: fedkd.Objective(terms)


class Batches:
    """Looks like a source of batches, and is never asked for one."""

    steps, example, epoch = 1, None, None


def distill(**changes: Any) -> Call:
    given: dict[str, Any] = {
        "student": TEACHER,
        "batches": Batches(),
        "objective": fedkd.Objective([fedkd.Term("kd", KDLoss())]),
        **changes,
    }
    return lambda: fedkd.distill(**given)


def experiment(values: Any, *overrides: Any) -> Call:
    return lambda: fedkd.make_experiment(values, *overrides)


def body(**changes: Any) -> Call:
    given: dict[str, Any] = {"body": nn.Linear(4, 4), "mean": [0.5], "std": [0.5], **changes}
    return lambda: fedkd.Network(**given)


BAD_PARTS: list[tuple[Call, str]] = [
    (term(loss="kd"), "loss: expected a DistillationLoss or an EnsembleLoss, got 'kd'"),
    (term(loss=KDLoss), "loss: .*got the class KDLoss; make one"),
    (term(loss=nn.KLDivLoss()), "loss: .*got KLDivLoss"),
    (term(name=3), "name: .*got 3"),
    (term(weight=math.nan), "weight: expected a number of at least 0, got nan"),
    (term(weight=math.inf), "weight: .*got inf"),
    (term(weight=-1), "weight: .*got -1"),
    (term(weight="1"), "weight: .*got '1'"),
    (term(weight=True), "weight: .*got True"),
    (term(warmup=-1), "warmup: expected a whole number of at least 0, got -1"),
    (term(start=0), "start: .*got 0"),
    (term(stop=1.5), "stop: .*got 1.5"),
    (term(decay_from="x"), "decay_from: .*got 'x'"),
    (objective(), "an objective needs at least one loss"),
    (objective("kd"), r"terms\[0\]: expected a fedkd.Term, got str"),
    (objective(KDLoss()), r"terms\[0\]: expected a fedkd.Term, got KDLoss; write fedkd.Term"),
    (lambda: fedkd.Objective(3), "terms: expected a list of fedkd.Term, got int"),
    (distill(student="mlp"), "student: expected a fedkd.Network, got 'mlp'"),
    (distill(student=TEACHER.body), "student: expected a fedkd.Network, got Perceptron"),
    (distill(batches=SET), "batches: .*got ImageSet"),
    (distill(objective=["kd"]), "objective: expected a fedkd.Objective.*got list"),
    (distill(epochs=0), "epochs: expected a whole number of at least 1, got 0"),
    (distill(epochs=1.5), "epochs: .*got 1.5"),
    (distill(epochs=True), "epochs: .*got True"),
    (distill(optimizer={"lr": 1}), "optimizer: .*got dict"),
    (distill(precision="half"), "precision: expected one of float32, .*got 'half'"),
    (distill(seed="x"), "seed: .*got 'x'"),
    (distill(on_epoch=3), "on_epoch: .*got int"),
    (lambda: fedkd.Optimizer(lr=0), "lr: expected a number above 0, got 0"),
    (lambda: fedkd.Optimizer(lr=math.nan), "lr: expected a number of at least 0, got nan"),
    (lambda: fedkd.Optimizer(name="sgdd"), "name: .*did you mean 'sgd'"),
    (lambda: fedkd.Experiment(clients=0), "clients: .*got 0"),
    (experiment(None), "values: expected a mapping of keys, got NoneType"),
    (experiment({}, "rounds=5"), "overrides: expected a list .*got 'rounds=5'"),
    (experiment({}, [3]), r"overrides: .*got \[3\]"),
    (experiment({"distillation": {"epochs": 0}}), "distillation.epochs: .*got 0"),
    (lambda: fedkd.load_experiment(None), "path: expected a YAML file, got None"),
    (body(body=TEACHER), "body: is a Network already"),
    (body(body="mlp"), "body: expected a torch.nn.Module, got str"),
    (body(std=[0.0]), "std: expected positive values"),
    (body(std=[math.nan]), "std: expected one finite number per channel"),
    (body(mean=[]), "mean: expected one finite number per channel"),
    (body(mean=0.5), "mean: expected one finite number per channel"),
    (body(mean=[0.5] * 3), "mean and std: .*got 3 and 1"),
]

NO_COUNTS = [0, -1, 1.0, 2.5, math.nan, math.inf, True, "3", None, np.float64(2), np.bool_(True)]
NO_SEEDS = [-1, 0.5, math.nan, True, "3", None, torch.tensor(3)]


def bad_numbers() -> list[tuple[Call, str]]:
    cases = []
    for call in (student, teacher):
        for name, values in (("epochs", NO_COUNTS), ("batch_size", NO_COUNTS), ("seed", NO_SEEDS)):
            cases += [
                (call(**{name: value}), f"{name}: expected a whole number") for value in values
            ]
    return cases


@pytest.mark.parametrize(
    ("call", "message"), BAD_NETWORKS + BAD_ARGUMENTS + BAD_PARTS + bad_numbers()
)
def test_one_line_that_begins_with_the_argument(call: Call, message: str) -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=f"^{message}") as refused:
        call()
    assert "\n" not in str(refused.value)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_transfer_set_of_a_split_is_asked_for_its_images() -> None:
    data = fedkd.federate(SET, SET, clients=1, partition="iid", transfer_size=4, seed=0)
    with pytest.raises(ValueError, match=r"transfer: .*got TransferSet; give transfer.images"):
        student(transfer=data.transfer)()


def test_teachers_come_from_anything_that_gives_them_once() -> None:
    wanted = student(teachers=[TEACHER, OTHER])().state_dict()
    for given in (iter([TEACHER, OTHER]), (TEACHER, OTHER), nn.ModuleList([TEACHER, OTHER])):
        found = student(teachers=given, losses=iter(["kd"]), fusion=iter(["uniform"]))()
        assert all(torch.equal(wanted[key], value) for key, value in found.state_dict().items())


def test_numbers_of_numpy_are_numbers() -> None:
    plain = student(epochs=2, batch_size=4, seed=3)().state_dict()
    counts = {"epochs": np.int64(2), "batch_size": np.int32(4), "seed": np.uint8(3)}
    numpys = student(**counts)().state_dict()
    assert all(torch.equal(plain[key], value) for key, value in numpys.items())


def test_modes_weights_and_statistics_of_teachers_stay() -> None:
    trained = net(SET, "resnet8").train()
    trained.body.stage1.eval()
    modes = [module.training for module in trained.modules()]
    before = copy.deepcopy(trained.state_dict())
    student(teachers=[trained, OTHER])()
    assert modes == [module.training for module in trained.modules()]
    assert all(torch.equal(before[key], value) for key, value in trained.state_dict().items())


def test_a_student_made_of_a_copy_of_a_teacher_or_of_its_frozen_trunk_is_fine() -> None:
    student(student=copy.deepcopy(TEACHER))()
    own = net(seed=5)
    own.body.trunk.requires_grad_(False)
    student(student=sharing(own), teachers=[own])()


def test_a_teacher_that_fails_on_one_image_is_named_with_the_count() -> None:
    class Relative(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(64, 4)

        def forward(self, images: Tensor) -> Tensor:
            return self.fc(images.flatten(1)) / images.sum(dim=(1, 2, 3))[:, None]

    black = torch.cat([SET.images, torch.zeros(1, 1, 8, 8, dtype=torch.uint8)])
    made = fedkd.Network(Relative(), mean=[0.0], std=[1.0])
    with pytest.raises(
        ValueError, match=r"^teachers\[0\]: its logits are nan or infinite for 1 of 17 images"
    ):
        student(teachers=[made], transfer=fedkd.ImageSet(black, None, SET.classes))()


@pytest.mark.parametrize("loss", ["rkd", "cka", "wkd_l", "hcd", "cat"])
def test_a_loss_that_needs_a_head_names_itself_and_the_network(loss: str) -> None:
    body = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.LogSoftmax(1))
    headless = fedkd.network(body, SET)
    full = fedkd.network("resnet8", SET)
    with pytest.raises(ValueError, match=rf"^teachers\[0\] \(Sequential\): .*loss '{loss}'"):
        student(student="resnet8", teachers=[headless], losses=["kd", loss])()
    if loss != "wkd_l":  # it only asks teachers
        with pytest.raises(ValueError, match=rf"^student \(Sequential\): .*loss '{loss}'"):
            student(student=copy.deepcopy(headless), teachers=[full], losses=["kd", loss])()


def test_losses_of_the_same_name_are_told_apart() -> None:
    records: list[Any] = []
    student(losses=[KDLoss(temperature=1), KDLoss(temperature=4)], on_epoch=records.append)()
    assert set(records[0].terms) == {"KDLoss.0", "KDLoss.1"}
    student(losses=["kd"], on_epoch=records.append)()
    assert set(records[1].terms) == {"kd"}


def test_a_network_of_ones_own_gets_its_head_at_the_door() -> None:
    body = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 4))
    own = fedkd.Network(body, mean=[0.5], std=[0.5])
    assert own.head_name is None
    student(teachers=[own], losses=[RKDLoss()])()
    assert own.head_name == "3"
    wrong = fedkd.Network(body, mean=[0.5], std=[0.5], head="1")
    with pytest.raises(ValueError, match=r"teachers\[0\] .* has the head '1', but it is linear"):
        student(teachers=[wrong])()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.randn(4, 1, 8, 8) * 3, r"expected uint8 or floats in \[0, 1\], got floats from -"),
        (SET.images.float(), r"got floats from 0 to 255; .*divide by 255"),
        (torch.full((2, 1, 8, 8), math.nan), "got floats from nan to nan"),
        (SET.images.long(), "expected uint8 or floats .*got torch.int64"),
        (SET.images > 9, "got torch.bool"),
        (SET.images[0], r"takes 1-channel images \(B, 1, h, w\), got \(1, 8, 8\)"),
        (COLOUR.images, r"takes 1-channel images .*got \(16, 3, 8, 8\)"),
    ],
)
def test_images_that_are_normalised_already_or_of_another_kind_are_refused(
    given: Tensor, message: str
) -> None:
    for call in (TEACHER, TEACHER.read):
        with pytest.raises(ValueError, match=f"^images: .*{message}"):
            call(given)


def test_grey_images_do_not_become_colour_in_silence() -> None:
    with pytest.raises(ValueError, match="takes 3-channel images"):
        net(COLOUR, "cnn_tiny")(SET.images)


def test_floats_and_bytes_of_the_same_pixels_give_the_same_logits() -> None:
    for floats in (SET.images / 255, SET.images.double() / 255):
        torch.testing.assert_close(TEACHER(floats), TEACHER(SET.images))
    torch.func.vmap(TEACHER)(SET.images[:, None] / 255)


@pytest.mark.parametrize("training", [True, False])
def test_a_module_that_normalises_by_itself_is_refused_with_the_remedy(training: bool) -> None:
    class LocalShard(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.tensor([0.5]).view(1, 1, 1, 1))
            self.register_buffer("std", torch.tensor([0.5]).view(1, 1, 1, 1))
            self.fc = nn.Linear(64, 4)

        def forward(self, images: Tensor) -> Tensor:
            return self.fc(((images - self.mean) / self.std).flatten(1))

    from fedkd.data.vision import transforms

    normalise = transforms.Normalize([0.5], [0.5])
    chain = nn.Sequential(normalise, nn.Flatten(), nn.Linear(64, 4))
    for body in (LocalShard(), chain, nn.Sequential(LocalShard()), nn.Sequential(net())):
        with pytest.raises(ValueError, match=r"normalises images itself .*mean=\[0.0\]"):
            fedkd.network(body.train(training), SET)
    fedkd.network(fedkd.Network(chain, mean=[0.0], std=[1.0]), SET)
