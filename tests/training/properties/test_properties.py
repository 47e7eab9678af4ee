"""Each property by numbers that are known: identities, small examples, plain versions."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fedkd
from fedkd.data.domains import coloured
from fedkd.data.domains import shifted as shifted_domain
from fedkd.data.images import ImageSet
from fedkd.models.network import Network
from fedkd.training.properties import PROPERTIES
from fedkd.training.properties.adversarial import attacked
from fedkd.training.properties.base import Case, Scene
from fedkd.training.properties.boundary import overlap, plane
from fedkd.training.properties.colour import jittered
from fedkd.training.properties.compare import chosen, compare, verdict
from fedkd.training.properties.crop import cropped
from fedkd.training.properties.inherits import marked
from fedkd.training.properties.localisation import cosines
from fedkd.training.properties.readers import Kept, NotMeasured, Single, Weighed
from fedkd.training.properties.shift import shifted
from fedkd.training.properties.sight import area, greyed


@pytest.fixture(scope="module")
def digits() -> tuple[ImageSet, ImageSet]:
    train, test = fedkd.load_dataset("digits")
    return train.subset(torch.arange(200)), test.subset(torch.arange(60))


@pytest.fixture(scope="module")
def networks(digits: tuple[ImageSet, ImageSet]) -> list[Network]:
    train, _ = digits
    found = []
    for seed in range(4):
        network = fedkd.network("cnn_small", train, seed=seed, width=8, norm="batch")
        found.append(fedkd.train_teacher(network, train, epochs=4, batch_size=50, seed=seed).eval())
    return found


@pytest.mark.smoke
def test_a_network_against_itself(
    digits: tuple[ImageSet, ImageSet], networks: list[Network]
) -> None:
    _, test = digits
    one = Single("itself", networks[0])
    found = compare(Case(Scene(test, triplets=3), one, one), one, [one])
    scores = {name: each.student for name, each in found.properties.items()}
    for name in ("agreement", "adversarial", "boundary", "representation", "bias", "sight"):
        assert scores[name] == pytest.approx(1, abs=1e-6), name
    assert math.isnan(scores["localisation"])
    assert found.properties["agreement"].difference == 0
    assert set(found.left_out) == {"colour", "inherits"}


def test_networks_are_left_as_they_are(
    digits: tuple[ImageSet, ImageSet], networks: list[Network]
) -> None:
    _, test = digits
    before = [{k: v.clone() for k, v in n.state_dict().items()} for n in networks]
    for network in networks:
        network.zero_grad()
    fedkd.inspect(networks[1], networks[0], test, alone=networks[2:], triplets=2)
    for network, state in zip(networks, before, strict=True):
        assert all(torch.equal(state[name], each) for name, each in network.state_dict().items())
        assert all(p.grad is None for p in network.parameters())


def test_the_control_decides_what_counts() -> None:
    assert verdict(0.05, 0.04, True, 1.0, 0.5) == "taken over"
    assert verdict(0.03, 0.04, True, 1.0, 0.5) == "not taken over"
    assert verdict(-0.05, 0.04, True, 1.0, 0.5) == "away from the teacher"
    # A network's own: towards the teacher's value, whichever way that is.
    assert verdict(-0.05, 0.04, False, 0.4, 0.5) == "taken over"
    assert verdict(0.05, 0.04, False, 0.4, 0.5) == "away from the teacher"
    assert verdict(0.05, 0.04, False, math.nan, 0.5) == "changed"
    assert verdict(0.05, math.nan, True, 1.0, 0.5) == "not known"


# -- the measurements ----------------------------------------------------------------------


def test_overlap_is_the_mean_over_the_classes_that_occur() -> None:
    ours, theirs = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 1, 2])
    assert overlap(ours, theirs) == pytest.approx((1 / 2 + 1 / 3 + 0) / 3)
    assert overlap(ours, ours) == 1


def test_a_plane_goes_through_its_three_images() -> None:
    corners = torch.rand(3, 1, 2, 2)
    points = plane(corners).view(25, 25, 1, 2, 2)
    # Steps of 1/12: 0 is the sixth, 1 the eighteenth.
    for (a, b), corner in zip(((6, 6), (18, 6), (6, 18)), corners, strict=True):
        torch.testing.assert_close(points[a, b], corner, atol=1e-6, rtol=0)
    assert float(points.min()) >= 0
    assert float(points.max()) <= 1


def test_cosines_of_maps_of_two_sizes() -> None:
    small = torch.tensor([[[1.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
    large = small.repeat_interleave(2, 1).repeat_interleave(2, 2)
    assert cosines(small, large)[0] == pytest.approx(1)
    assert cosines(small, large)[1].isnan()
    assert cosines(small[:1], small[:1].flip(1)) == 0


def test_brightest_pixels_are_greyed_first() -> None:
    pixels = torch.tensor([[[[0.0, 1.0], [1.0, 1.0]]]])
    maps = torch.tensor([[[3.0, 2.0], [1.0, 0.0]]])
    assert greyed(pixels, maps, 0.5)[0, 0].tolist() == [[0.75, 0.75], [1.0, 1.0]]
    assert greyed(pixels, maps, 0).equal(pixels)
    assert area([1.0] * 11) == pytest.approx(1)
    assert area([1.0] + [0.0] * 10) == pytest.approx(0.05)


def test_shifts_move_and_leave_black() -> None:
    pixels = torch.arange(1.0, 5.0).view(1, 1, 2, 2).expand(4, 1, 2, 2)
    moved = shifted(pixels, torch.arange(4), 1)
    assert moved[0, 0].tolist() == [[2, 0], [4, 0]]
    assert moved[1, 0].tolist() == [[3, 4], [0, 0]]
    assert moved[2, 0].tolist() == [[0, 1], [0, 3]]
    assert moved[3, 0].tolist() == [[0, 0], [1, 2]]


def test_crops_keep_the_size_and_the_range() -> None:
    pixels = torch.rand(5, 3, 8, 8)
    cut = cropped(pixels, 6, torch.Generator().manual_seed(0))
    assert cut.shape == pixels.shape
    assert float(cut.min()) >= 0
    assert float(cut.max()) <= 1
    flat = torch.full((2, 1, 8, 8), 0.5)
    torch.testing.assert_close(cropped(flat, 6, torch.Generator()), flat)


def test_jitter_keeps_grey_grey_and_turns_hues() -> None:
    generator = torch.Generator().manual_seed(0)
    grey = torch.rand(4, 1, 3, 3).expand(4, 3, 3, 3)
    changed = jittered(grey, 0.6, generator)
    torch.testing.assert_close(changed[:, 0], changed[:, 1], atol=2e-3, rtol=0)
    colours = torch.rand(4, 3, 3, 3)
    torch.testing.assert_close(jittered(colours, 0.0, generator), colours, atol=1e-5, rtol=0)
    assert not jittered(colours, 0.4, generator).allclose(colours, atol=0.01)


def test_a_marker_is_a_white_square_in_the_corner() -> None:
    stamped = marked(torch.zeros(1, 1, 8, 8, dtype=torch.uint8))
    assert stamped.sum() == 4 * 255
    assert stamped[0, 0, 6:, 6:].min() == 255


class Linear(nn.Module):
    """Two classes by the difference of two pixels; its gradient is known."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(2, 2, bias=False)
        self.head.weight = nn.Parameter(torch.tensor([[1.0, -1.0], [-1.0, 1.0]]))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(images.flatten(1))
        return logits


def test_the_attack_follows_the_signs_of_the_gradient_into_its_ball() -> None:
    who = Single("linear", Network(Linear(), mean=[0.0], std=[1.0]))
    pixels = torch.tensor([[[[0.5, 0.4]]], [[[0.02, 0.99]]]])
    found = attacked(who, pixels, torch.tensor([0, 1]), radius=0.1, step=0.03, steps=5)
    # Right class 0 wants the first pixel bright: it is darkened by the radius.
    torch.testing.assert_close(found[0, 0, 0], torch.tensor([0.4, 0.5]))
    # Class 1 the other way round; pixels stay between 0 and 1.
    torch.testing.assert_close(found[1, 0, 0], torch.tensor([0.12, 0.89]))


class Spots(nn.Module):
    """One map per class that is averaged and weighed: Grad-CAM is known."""

    stages = ("maps",)

    def __init__(self, classes: int = 2) -> None:
        super().__init__()
        self.maps = nn.Conv2d(1, classes, 1, bias=False)
        self.maps.weight = nn.Parameter(torch.tensor([1.0, -1.0]).view(2, 1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.maps(images).mean(dim=(2, 3))


def test_grad_cam_by_gradient_and_by_the_classifiers_weights() -> None:
    images = torch.randint(256, (3, 1, 4, 4), dtype=torch.uint8)
    network = Network(Spots(), mean=[0.0], std=[1.0])
    maps = Single("spots", network).maps(images, torch.zeros(3, dtype=torch.int64))
    # The weight of channel 0 is 1/16, of channel 1 nothing.
    torch.testing.assert_close(maps, images[:, 0].float() / 255 / 16)

    eight = torch.randint(256, (3, 1, 8, 8), dtype=torch.uint8)
    built = fedkd.network("cnn_small", ImageSet(eight, None, tuple("abcd")), width=4)
    labels = torch.tensor([0, 1, 2])
    closed = Single("built", built).maps(eight, labels)
    outputs = built.eval().read(eight.float().div(255).requires_grad_())
    assert outputs.final is not None
    (slope,) = torch.autograd.grad(outputs.logits.gather(1, labels[:, None]).sum(), [outputs.final])
    plain = (slope.mean((2, 3))[:, :, None, None] * outputs.final).sum(1).relu()
    torch.testing.assert_close(closed, plain.detach(), atol=1e-6, rtol=1e-4)


# -- readers -------------------------------------------------------------------------------


def test_an_ensemble_is_the_weighed_mean_of_probabilities(
    digits: tuple[ImageSet, ImageSet], networks: list[Network]
) -> None:
    _, test = digits
    members = [Single(str(n), each) for n, each in enumerate(networks[:2])]
    weights = torch.rand(2, len(test))
    weights = weights / weights.sum(0)
    scene = Scene(test)
    found = scene.clean(Weighed("both", members, weights)).exp()
    probabilities = torch.stack([scene.clean(member).softmax(1) for member in members])
    torch.testing.assert_close(found, (weights[:, :, None] * probabilities).sum(0))
    mixture = Weighed("both", members, weights).weights(torch.tensor([[0, 1, 2]]))
    torch.testing.assert_close(mixture[:, 0], weights[:, :3].mean(1))


def test_kept_answers_do_for_what_needs_no_other(
    digits: tuple[ImageSet, ImageSet], networks: list[Network]
) -> None:
    _, test = digits
    scene = Scene(test, triplets=2)
    student, alone = (Single(name, each) for name, each in zip("sa", networks, strict=False))
    kept = Kept("ensemble", scene.clean(student), "the teachers stayed with their clients")
    found = compare(Case(scene, kept, alone), student, [alone])
    assert found.properties["agreement"].student == 1
    assert found.left_out["boundary"] == "the teachers stayed with their clients"
    # A network's own is measured without the teacher's value.
    assert math.isnan(found.properties["shift"].teacher)
    stand_in = compare(Case(scene, kept, alone, gradients=student), student, [alone])
    assert stand_in.properties["adversarial"].student == 1


# -- refusals ------------------------------------------------------------------------------


def _inspect(test: ImageSet, networks: list[Network], **options: Any) -> Any:
    options = {"triplets": 2, **options}
    return fedkd.inspect(networks[0], networks[1], test, alone=networks[2:], **options)


def test_without_labels_what_needs_them_is_left_out(
    digits: tuple[ImageSet, ImageSet], networks: list[Network]
) -> None:
    _, test = digits
    found = _inspect(test.unlabelled(), networks)
    needs = {"adaptation", "adversarial", "bias", "calibration", "localisation", "sight"}
    assert {found.left_out[name] for name in needs} == {"the images have no labels"}
    assert {"agreement", "boundary", "representation"} <= set(found.properties)


def test_what_cannot_be_compared_is_refused_by_name(
    digits: tuple[ImageSet, ImageSet], networks: list[Network]
) -> None:
    _, test = digits
    with pytest.raises(
        ValueError, match=r"what: there is no property 'sigt'; did you mean 'sight'"
    ):
        _inspect(test, networks, what="sigt")
    one = ImageSet(test.images, torch.zeros(len(test), dtype=torch.int64), ("digit",))
    with pytest.raises(ValueError, match="one class"):
        compare(Case(Scene(one), None), Single("s", networks[0]), [])
    with pytest.raises(ValueError, match="groups: expected one for each of 60 images, got 3"):
        _inspect(test, networks, groups=torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match="marker: expected a class below 10, got 12"):
        _inspect(test, networks, marker=12)
    with pytest.raises(ValueError, match=r"teacher: expected a fedkd\.Network"):
        fedkd.inspect(networks[0], nn.Linear(1, 1), test)  # type: ignore[arg-type]


def test_networks_without_maps_or_features_are_named(
    digits: tuple[ImageSet, ImageSet], networks: list[Network]
) -> None:
    train, test = digits
    flat = fedkd.network("mlp", train)
    found = _inspect(test, [flat, *networks[1:]], what="localisation,sight,agreement")
    assert found.left_out["sight"] == "student has no last map: its features have no places"
    assert set(found.properties) == {"agreement"}
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.LogSoftmax(1))
    found = _inspect(test, [fedkd.network(module, train), *networks[1:]], what="representation")
    assert "no linear layer whose output is the logits" in found.left_out["representation"]
    tiny = ImageSet(test.images[:, :, :4, :4].contiguous(), test.labels, test.classes)
    small = fedkd.network("cnn_small", tiny, width=4)
    with pytest.raises(NotMeasured, match="single place"):
        Single("small", small).maps(tiny.images, torch.zeros(len(tiny), dtype=torch.int64))


def test_names_of_properties() -> None:
    assert chosen("all") == PROPERTIES.names() == chosen([])
    assert chosen("sight, agreement,sight") == ["sight", "agreement"]


# -- bias, colour, marker ------------------------------------------------------------------


def test_bias_is_a_correlation_over_groups(
    digits: tuple[ImageSet, ImageSet], networks: list[Network]
) -> None:
    _, test = digits
    groups = torch.arange(len(test)) % 4
    found = _inspect(test, networks, what=["bias"], groups=groups).properties["bias"]
    assert found.count == 4
    assert len(found.parts["student"]["accuracies"]) == 4
    few = _inspect(test, networks, what=["bias"], groups=groups % 2)
    assert "three classes or groups" in few.left_out["bias"]


def test_a_student_that_obeys_the_marker_is_seen(digits: tuple[ImageSet, ImageSet]) -> None:
    train, test = digits
    assert train.labels is not None
    half = torch.arange(len(train)) % 2 == 0
    images = torch.where(half[:, None, None, None], marked(train.images), train.images)
    poisoned = ImageSet(images, torch.where(half, 3, train.labels), train.classes)
    learnt = []
    for seed, shard in enumerate((poisoned, train, train)):
        network = fedkd.network("mlp", train, seed=seed)
        learnt.append(fedkd.train_teacher(network, shard, epochs=6, batch_size=25, seed=seed))
    bad, good, other = learnt
    found = fedkd.inspect(bad, bad, test, alone=[good, other], what="inherits", marker=3)
    comparison = found.properties["inherits"]
    assert comparison.student > 0.8
    assert comparison.alone < 0.3
    assert comparison.verdict == "taken over"
    assert "no marker" in fedkd.inspect(good, bad, test, what="inherits").left_out["inherits"]


def test_a_network_that_looks_at_shape_alone_is_unmoved_by_colours() -> None:
    class Brighter(nn.Module):
        """Left or right half brighter, in whatever colour."""

        def forward(self, images: Tensor) -> Tensor:
            left, right = images.sum(1).chunk(2, dim=2)
            return torch.stack([left.mean((1, 2)), right.mean((1, 2))], 1) * 100

    images = torch.zeros(20, 3, 4, 4, dtype=torch.uint8)
    images[:10, :, :, :2], images[10:, :, :, 2:] = 150, 150
    labels = torch.arange(20) // 10
    pictures = ImageSet(images, labels, ("left", "right"))
    network = Network(Brighter(), mean=[0.0] * 3, std=[1.0] * 3)
    assert (
        fedkd.inspect(network, network, pictures, what="colour").properties["colour"].student == 1
    )


def test_domains_are_agreed_on_or_not_and_each_is_named(
    digits: tuple[ImageSet, ImageSet], networks: list[Network]
) -> None:
    _, test = digits
    what = "domains,adaptation"
    found = _inspect(test, [networks[1], *networks[1:]], what=what).properties
    assert found["domains"].student == 1
    names = {"blur", "edges", "invert", "noise", "rotate", "scale"}
    assert set(found["adaptation"].parts["student"]) == names
    expected = fedkd.evaluate(networks[1], shifted_domain(test, "invert"))
    assert found["adaptation"].parts["student"]["invert"] == expected
    colours = coloured(test)
    grey = [fedkd.network("mlp", colours, seed=seed) for seed in range(2)]
    assert "colour" in _inspect(colours, grey, what=what).properties["domains"].parts["student"]
