import logging

import numpy as np
import pytest
import torch

from fedkd.data.labels import class_names, label_numbers, number_classes

LOG = "fedkd.data.labels"


@pytest.mark.parametrize(
    "names",
    [
        ["ash", "birch"],
        ("ash", "birch"),
        np.array(["ash", "birch"]),
        np.array([b"ash", b"birch"]),
        [b"ash", np.str_("birch")],
        {"ash": 0, "birch": 1},
    ],
)
def test_class_names_of_any_container_are_a_tuple_of_str(names):
    assert class_names(names) == ("ash", "birch")
    assert all(type(name) is str for name in class_names(names))


def test_odd_but_printable_names_are_kept():
    names = ("[red]", "a, b", "a/b", "$x^", "<b>", "ﬁ", "猫", "👩‍🚀", "x" * 5000, "it's", '"q"')
    assert class_names(names)[:5] == names[:5]
    assert class_names(names)[6:] == names[6:]


def test_composed_and_decomposed_accents_are_one_name():
    assert class_names(["e\u0301te\u0301"]) == class_names(["\u00e9t\u00e9"])
    with pytest.raises(ValueError, match="two classes are called"):
        class_names(["e\u0301", "\u00e9"])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "at least one class name"),
        ("abc", "expected a list of class names, got 'abc'"),
        (b"abc", "expected a list of class names"),
        (None, "expected a list of class names, got None"),
        (3, "expected a list of class names, got 3"),
        (np.array("a"), "expected a list of class names"),
        (np.array([["a"]]), "expected a list of class names"),
        (["a", 1], r"name 1: expected text, got 1 \(int\)"),
        (["a", None], "name 1: expected text, got None"),
        (["a", ""], "name 1: expected a name, got ''"),
        (["a", "  "], "name 1: expected a name"),
        (["a", "b\nc"], "cannot be printed"),
        (["a\x00"], "cannot be printed"),
        (["\x1b[31m"], "cannot be printed"),
        (["\udcff"], "cannot be printed"),
        ([b"\xff"], "UTF-8"),
        (["a", "b", "a"], r"two classes are called 'a'"),
        (["a", "a "], "two classes are called"),
    ],
)
def test_other_class_names_are_refused_in_one_line(names, message):
    with pytest.raises(ValueError, match=f"classes: .*{message}|classes: {message}") as error:
        class_names(names)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["u1", "i1", "<i4", ">i4", "i8", "u8"])
def test_labels_of_every_whole_type_are_int64(kind):
    for shape in ((3,), (3, 1)):
        labels = label_numbers(np.array([2, 0, 1]).astype(kind).reshape(shape))
        assert labels.dtype == torch.int64
        assert labels.tolist() == [2, 0, 1]


def test_labels_may_be_lists_and_tensors():
    assert label_numbers([1, 0]).tolist() == [1, 0]
    assert label_numbers(torch.tensor([[1], [0]], dtype=torch.int32)).tolist() == [1, 0]
    assert label_numbers([]).dtype == torch.int64


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.array([0.0, 1.0]), r"whole numbers, got float64; .*y.astype\('int64'\)"),
        (np.array([0.0, np.nan]), "1 of them are not finite"),
        (np.array([0.5, 1]), "such values are no classes"),
        (np.array([True, False]), r"got bool; .*y.astype\('int64'\)"),
        (np.array(["cat", "dog"]), "numpy.unique"),
        (np.array([b"cat", b"dog"]), "numpy.unique"),
        (np.eye(3, dtype=int), r"y.argmax\(axis=1\)"),
        (np.eye(3), r"y.argmax\(axis=1\)"),
        (np.ones((4, 3), int), "several classes"),
        (np.full((4, 2), 0.5), "soft labels"),
        (np.array([[0, 1, 2]]), r"y.ravel\(\)"),
        (np.zeros((2, 1, 1), int), r"got shape \(2, 1, 1\)"),
        (np.array(3), r"got shape \(\)"),
        (np.array([2**64 - 1], "u8"), "too large a number"),
        (np.array([1j]), "got complex128"),
        (np.array(["2020-01-01"], "M8[D]"), "whole numbers"),
        ([[1], [2, 3]], "labels: expected whole numbers"),
        (torch.tensor([0.0]), "got float32"),
        (None, "labels: expected whole numbers"),
    ],
)
def test_other_labels_are_refused_with_the_conversion(labels, message):
    with pytest.raises(ValueError, match=message) as error:
        label_numbers(labels)
    assert "\n" not in str(error.value)


def numbered(*parts: list[int]) -> tuple[list[list[int]], tuple[str, ...]]:
    labels, names = number_classes([torch.tensor(part, dtype=torch.int64) for part in parts])
    return [part.tolist() for part in labels], names


def test_labels_from_zero_stay_without_a_word(caplog):
    assert numbered([2, 0], [1]) == ([[2, 0], [1]], ("0", "1", "2"))
    assert not caplog.records


def test_a_small_gap_stays_with_a_warning(caplog):
    with caplog.at_level(logging.WARNING, LOG):
        assert numbered([0, 1, 3]) == ([[0, 1, 3]], ("0", "1", "2", "3"))
    assert "no image has label 2" in caplog.text


@pytest.mark.parametrize(
    ("part", "labels", "names"),
    [
        ([1, 2, 3], [0, 1, 2], ("1", "2", "3")),
        ([7, 7], [0, 0], ("7",)),
        ([0, 9], [0, 1], ("0", "9")),
        ([300012346, 300012345], [1, 0], ("300012345", "300012346")),
        ([0, 254, 255], [0, 1, 2], ("0", "254", "255")),
    ],
)
def test_other_numbers_are_numbered_anew_and_name_their_class(part, labels, names, caplog):
    with caplog.at_level(logging.WARNING, LOG):
        assert numbered(part) == ([labels], names)
    assert "numbered anew" in caplog.text


def test_all_parts_are_numbered_alike():
    assert numbered([1, 3], [2, 3]) == ([[0, 2], [1, 2]], ("1", "2", "3"))


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ([-1, 0, 1], "found -1; leave out images without a class"),
        ([0, 1, 255], "different ones up to 255, which usually marks images to ignore"),
        ([0, 65535], "which usually marks images to ignore"),
        ([], "at least one label"),
    ],
)
def test_numbers_that_mean_no_class_are_refused(part, message):
    with pytest.raises(ValueError, match=message):
        numbered(part)
