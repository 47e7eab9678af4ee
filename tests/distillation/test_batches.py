"""Batches for the student: the same for the same seed, and from any epoch on."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import fedkd
from fedkd.data.images import ImageSet
from fedkd.distillation.batches import OnlineBatches, TransferBatches
from fedkd.knowledge.kinds import Kind, Logits, Stage, TeacherStatistic, VirtualLogits
from fedkd.knowledge.payload import Bank, Knowledge, Teacher, fuse
from fedkd.models.network import Network


@pytest.fixture
def images() -> ImageSet:
    return fedkd.load_dataset("synthetic", classes=3, size=8, per_class=10)[0]


@pytest.fixture
def teacher(images: ImageSet) -> Network:
    return fedkd.network("cnn_tiny", images).eval()


def test_every_epoch_shows_all_images_in_an_order_of_its_own(images: ImageSet) -> None:
    batches = OnlineBatches(images, batch_size=8)
    epochs = [[batch.targets for batch in batches.epoch(number)] for number in (1, 2)]
    assert batches.steps == len(epochs[0]) == 4
    for epoch in epochs:
        assert torch.cat(epoch).bincount().tolist() == [10, 10, 10]
    assert not torch.cat(epochs[0]).equal(torch.cat(epochs[1]))


def test_an_epoch_does_not_depend_on_those_before(images: ImageSet, teacher: Network) -> None:
    def make() -> OnlineBatches:
        kinds = (Logits(), VirtualLogits(0))
        return OnlineBatches(images, [teacher], kinds, augment="crop", seed=3, batch_size=8)

    straight, anew = make(), make()
    for number in (1, 2):
        list(straight.epoch(number))
    for one, two in zip(straight.epoch(3), anew.epoch(3), strict=True):
        assert one.images.equal(two.images)
        assert one.ensemble.logits.equal(two.ensemble.logits)
        virtual = VirtualLogits(0)
        assert one.ensemble.tensors[virtual].equal(two.ensemble.tensors[virtual])  # type: ignore[union-attr]


def test_a_teacher_answers_to_the_very_pixels_the_student_sees(
    images: ImageSet, teacher: Network
) -> None:
    kinds = (Logits(), VirtualLogits(0), Stage(-1))
    batches = OnlineBatches(images, [teacher], kinds, augment="crop", virtual="randaugment")
    batch = next(batches.epoch(1))
    mine = batch.read(teacher, kinds)
    for kind in kinds:
        torch.testing.assert_close(mine[kind], batch.ensemble.tensors[kind][0])
    assert batch.virtual is not None
    assert not batch.virtual(0).equal(batch.images)
    assert not batch.virtual(0).equal(batch.virtual(1))


def test_teachers_of_different_shapes_stand_side_by_side(images: ImageSet) -> None:
    teachers = [fedkd.network("cnn_tiny", images, width=width).eval() for width in (4, 8)]
    batches = OnlineBatches(images, teachers, (Logits(), Stage(-1)), weights=[1.0, 3.0])
    ensemble = next(batches.epoch(1)).ensemble
    assert ensemble.logits.shape[0] == 2
    assert [maps.shape[1] for maps in ensemble.tensors[Stage(-1)]] == [6, 12]
    assert ensemble.weights[:, 0].tolist() == [0.25, 0.75]


@dataclass(frozen=True)
class Counted(TeacherStatistic):
    """A fact that costs a look at all images."""

    def state(self, network: Network, images: Tensor, labels: Tensor | None) -> Tensor:
        asked.append(len(images))
        return torch.zeros(3, 3)


asked: list[int] = []


def test_a_fact_is_asked_once_for_all_lessons_about_the_same_images(
    images: ImageSet, teacher: Network
) -> None:
    asked.clear()
    known: dict[Network, dict[Kind, Tensor]] = {}
    for _ in range(2):
        batches = OnlineBatches(images, [teacher], (Logits(), Counted()), known=known)
        assert next(batches.epoch(1)).ensemble.teacher(0)[Counted()].shape == (3, 3)
    assert asked == [30]


def test_who_lacks_what_is_named(images: ImageSet, teacher: Network) -> None:
    flat = fedkd.network("mlp", images).eval()
    batches = OnlineBatches(images, [teacher, flat], (Logits(), Stage(-1)))
    with pytest.raises(ValueError, match=r"stage\(index=-1\) cannot be read from teacher 1: it"):
        batches.example()
    batch = OnlineBatches(images).example()
    with pytest.raises(ValueError, match=r"cannot be read from the student"):
        batch.read(flat, (Stage(-1),))
    with pytest.raises(ValueError, match="needs labelled images"):
        OnlineBatches(images.unlabelled())


def test_shared_lessons_give_rows_of_the_bank(images: ImageSet) -> None:
    logits = torch.randn(len(images), 3)
    fused = fuse(Bank.of([Knowledge(Teacher(0), {Logits(): logits})]), [], labels=images.labels)
    batches = TransferBatches(images.images, fused, batch_size=7, seed=1)
    seen = torch.cat([batch.ensemble.logits[0] for batch in batches.epoch(1)])
    assert batches.steps == 5
    assert seen.sum(dim=0).allclose(logits.sum(dim=0), atol=1e-5)
    first = batches.example()
    assert first.ensemble.logits[0].equal(logits[: len(first.images)])
    assert first.virtual is None


def test_the_student_alone_sees_augmented_transfer_images(images: ImageSet) -> None:
    logits = torch.randn(len(images), 3)
    fused = fuse(Bank.of([Knowledge(Teacher(0), {Logits(): logits})]), [], labels=images.labels)
    plain = list(TransferBatches(images.images, fused, batch_size=7, seed=1).epoch(1))

    def moved() -> TransferBatches:
        return TransferBatches(images.images, fused, augment="crop", batch_size=7, seed=1)

    shown = list(moved().epoch(1))
    for before, after in zip(plain, shown, strict=True):
        assert after.ensemble.logits.equal(before.ensemble.logits)
        assert not after.images.equal(before.images)
    assert all(a.images.equal(b.images) for a, b in zip(shown, moved().epoch(1), strict=True))
    assert not next(iter(moved().epoch(2))).images.equal(shown[0].images)
