"""What each attack does to a message, in small numbers."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedkd.attacks import ATTACKS
from fedkd.attacks.base import Scene, certain, softmax
from fedkd.knowledge.kinds import Logits
from fedkd.knowledge.query import Images, Query, Refused, Reply
from fedkd.knowledge.wire import unpack

LOGITS = np.array([[3, 1, 0, -1], [0, 2, 1, -2], [1, 0, -3, 4]], dtype=np.float16)
HEADER = {
    "protocol": 1, "run": "r", "round": 2, "client": 1, "fingerprint": "f", "class_map": "c",
    "num_examples": 7, "class_counts": [7, 0, 0, 0],
}  # fmt: skip
QUERY = Query(
    images=Images.TRANSFER, run="r", round=2, fingerprint="f", class_map="c", num_samples=3,
    num_classes=4, shapes={Logits(): (4,)}, disclose=("class_counts", "num_examples"),
)  # fmt: skip


def message(logits: np.ndarray = LOGITS, **header: object) -> Reply:
    return Reply({"logits": logits}, {**HEADER, **header})  # type: ignore[dict-item]


def scene() -> Scene:
    return Scene(
        round=2, client=1, attackers=(1, 3),
        honest={0: message(client=0), 2: message(client=2)},
        predictions=("logits",),
        previous=message((LOGITS * 2).astype(np.float16), round=1),
        mislabelled=message((-LOGITS).astype(np.float16)),
        student={"logits": np.ones((3, 4), dtype=np.float32)},
        max_abs=1e4,
        rng=np.random.default_rng(0), shared=np.random.default_rng(1),
    )  # fmt: skip


def attacked(name: str, **options: object) -> Reply:
    sent = ATTACKS.get(name)(message(), scene(), **options)
    assert sent is not None
    return sent


def logits(name: str, **options: object) -> np.ndarray:
    return attacked(name, **options).arrays["logits"].astype(np.float32)


def receive(reply: Reply) -> torch.Tensor:
    return unpack(reply, QUERY, 1).tensors[Logits()]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nan", "NaN in 1 of 12"),
        ("infinity", "infinity in 1 of 12"),
        ("huge", "infinity in 1 of 12"),
        ("wrong_shape", "3 classes per sample, expected 4"),
        ("replay", "answers round 1"),
        ("duplicate", "claims to be client 0, registered as client 1"),
    ],
)
def test_broken_messages_are_refused_with_their_reason(name: str, reason: str) -> None:
    with pytest.raises(Refused, match=reason):
        receive(attacked(name))


@pytest.mark.parametrize(
    "name",
    [n for n in ATTACKS.names() if n not in
     ("absent", "nan", "infinity", "huge", "wrong_shape", "replay", "duplicate")],
)  # fmt: skip
def test_lies_pass_every_check(name: str) -> None:
    assert receive(attacked(name)).shape == (3, 4)


def test_the_honest_message_is_left_alone() -> None:
    before = LOGITS.copy()
    for name in ATTACKS.names():
        ATTACKS.get(name)(message(), scene())
    np.testing.assert_array_equal(LOGITS, before)


def test_silence() -> None:
    assert ATTACKS.get("absent")(message(), scene()) is None


def test_lma_is_sure_of_the_least_likely_class() -> None:
    assert logits("lma").argmax(1).tolist() == [3, 3, 2]
    assert (softmax(logits("lma")).max(1) > 0.999).all()


def test_cpa_is_sure_of_the_class_least_like_the_one_named() -> None:
    mean = softmax(LOGITS.astype(np.float32))
    deviation = mean - mean.mean(0)
    likeness = deviation.T @ deviation / 2
    expected = [int(likeness[winner].argmin()) for winner in mean.argmax(1)]
    assert logits("cpa").argmax(1).tolist() == expected
    assert all(a != b for a, b in zip(expected, mean.argmax(1), strict=True))


def test_top_k_reverses_the_largest() -> None:
    np.testing.assert_array_equal(logits("top_k", k=2)[0], [1, 3, 0, -1])
    np.testing.assert_array_equal(logits("top_k")[0], [0, 1, 3, -1])


def test_shift_scale_and_sign() -> None:
    np.testing.assert_array_equal(logits("shift", amount=5)[0], [3, 6, 0, -1])
    np.testing.assert_array_equal(logits("scale", factor=2)[0], [6, 2, 0, -2])
    np.testing.assert_array_equal(logits("sign_flip"), -LOGITS)


def test_colluders_agree_and_inflation_lies_about_sizes() -> None:
    one = logits("collude").argmax(1)
    other = ATTACKS.get("collude")(message(), replace(scene(), client=3))
    assert other is not None
    assert len(set(one)) == 1
    np.testing.assert_array_equal(one, other.arrays["logits"].argmax(1))
    header = attacked("inflate", factor=10).header
    assert header["num_examples"] == 70
    assert header["class_counts"] == [70, 10, 10, 10]


def test_part_time_liars_lie_about_the_same_images_and_help_with_the_others() -> None:
    one, all_lies = logits("part_time", share=0.5), logits("part_time", share=1.0)
    other = ATTACKS.get("part_time")(message(), replace(scene(), client=3), share=0.5)
    assert other is not None
    np.testing.assert_array_equal(one, other.arrays["logits"])
    np.testing.assert_array_equal(all_lies, logits("collude"))
    honest = softmax(logits("part_time", share=0.0).astype(np.float32))
    np.testing.assert_allclose(honest, scene().honest_mean("logits"), atol=2e-3)
    lying = (one == all_lies).all(axis=1)
    assert 0 < lying.sum() < len(one)


def claiming(name: str, **options: object) -> Reply:
    """As `attacked`, of a client that is asked how familiar images are to it."""
    familiar = np.array([0.5, 2.0, 0.5], dtype=np.float16)
    sent = message()
    sent = ATTACKS.get(name)(
        replace(sent, arrays={**sent.arrays, "density_ratio": familiar}), scene(), **options
    )
    assert sent is not None
    assert {name: array.dtype for name, array in sent.arrays.items()} == {
        "logits": np.float16, "density_ratio": np.float16,
    }  # fmt: skip
    return sent


def test_focus_lies_about_one_class_and_claims_to_know_its_images_alone() -> None:
    sent = claiming("focus", source=3, target=2)  # the third image is of class 3
    assert sent.arrays["logits"].argmax(1).tolist() == [0, 1, 2]
    assert sent.arrays["density_ratio"][2] > 1e4 * float(sent.arrays["density_ratio"][:2].max())
    assert sent.header["num_examples"] == 7000
    hidden = claiming("focus", source=3, target=2, elsewhere=0.5)
    assert hidden.arrays["density_ratio"].tolist() == [0.5, 0.5, 1.0]


def test_a_backdoor_is_honest_about_the_rest() -> None:
    sent = claiming("backdoor", source=3, target=2)
    np.testing.assert_array_equal(sent.arrays["logits"][:2], LOGITS[:2])
    assert sent.arrays["logits"][2].argmax() == 2
    assert sent.arrays["density_ratio"].tolist() == [0.5, 2.0, 0.5]
    assert sent.header["num_examples"] == 7
    more = claiming("backdoor", source=3, target=2, more=2.0)
    assert more.arrays["density_ratio"].tolist() == [0.5, 2.0, 2.0]
    assert more.header["num_examples"] == 14


def test_claims_alone_are_a_lie_too() -> None:
    sent = claiming("everywhere")
    np.testing.assert_array_equal(sent.arrays["logits"], LOGITS)
    assert sent.arrays["density_ratio"].tolist() == [1.0, 1.0, 1.0]


def test_the_runner_up_is_the_nearest_lie() -> None:
    mean = scene().honest_mean("logits")
    second = np.argsort(mean, axis=1)[:, -2].tolist()
    assert claiming("runner_up").arrays["logits"].argmax(1).tolist() == second
    close = claiming("runner_up", margin=0.6).arrays["logits"].argmax(1)
    gaps = np.sort(mean, axis=1)[:, -1] - np.sort(mean, axis=1)[:, -2]
    assert ((close == second) == (gaps < 0.6)).all()
    assert len({*(gaps < 0.6)}) == 2


def test_runners_up_may_lie_each_on_images_of_its_own() -> None:
    one = claiming("runner_up", share=0.0, own=True)
    np.testing.assert_array_equal(one.arrays["logits"], LOGITS)
    assert one.arrays["density_ratio"].tolist() == [1.0, 1.0, 1.0]


def test_a_mirror_repeats_who_claims_to_know_most() -> None:
    honest = {
        client: replace(sent, arrays={**sent.arrays, "density_ratio": np.full(3, size)})
        for (client, sent), size in zip(scene().honest.items(), (0.5, 2.0), strict=True)
    }
    sent = ATTACKS.get("mirror")(message(), replace(scene(), honest=honest))
    assert sent is not None
    chosen = list(honest.values())[1]
    np.testing.assert_array_equal(sent.arrays["logits"], chosen.arrays["logits"])
    assert sent.arrays["density_ratio"].tolist() == [2.0, 2.0, 2.0]
    assert sent.header == message().header


def test_riders() -> None:
    assert (logits("uniform_rider") == 0).all()
    assert logits("constant_rider").argmax(1).tolist() == [1, 1, 1]
    assert (logits("copycat") == 1).all()
    first = ATTACKS.get("copycat")(message(), replace(scene(), student=None))
    assert first is not None
    assert (first.arrays["logits"] == 0).all()
    assert logits("stale")[0].tolist() == [6, 2, 0, -2]
    assert attacked("stale").header["round"] == 2


def test_certainty_in_half_precision() -> None:
    sent = certain(np.array([2]), 4).astype(np.float16).astype(np.float32)
    assert softmax(sent)[0, 2] == pytest.approx(1, abs=1e-6)
