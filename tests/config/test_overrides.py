"""Overrides and odd YAML files: what they reach; every mistake is one line with a remedy."""

from pathlib import Path

import pytest

from fedkd.build import check
from fedkd.config import ConfigError, load_experiment, make_experiment, parse_yaml


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("data=digits", "did you mean data.dataset=digits?"),
        ("teachers.optimizer=adma", "did you mean 'adam'?"),
        ("teachers=5", "teachers: expected a mapping (keys: models, epochs,"),
        ("student=null", "student: is empty; leave the key out, or give some of: model"),
        ("data.partition=[a]", "data.partition: expected a name, or a mapping with a name and"),
        ("student=", "override 'student=': the value is missing; for none write student=null"),
        ("=5", "expected key=value without spaces"),
        ("a..b=3", "'a..b' has a dot too many"),
        (".rounds=3", "'.rounds' has a dot too many"),
        ("rounds.x=3", "rounds is a value, not a section (3)"),
        ("name.x=3", "name is a value, not a section ('experiment')"),
        ("evaluation.baselines.0.x=3", "evaluation.baselines.0 is a value, not a section"),
        ("distillation.losses.9.x=1", "'9' is not an index of a list of 2; its places are 0 to 1"),
        ("distillation.losses.-1=kd", "'-1' is not an index of a list of 2; its places are"),
        ("distillation.losses.weight=2", "name one, for example distillation.losses.0.weight"),
        ("distillation.losses.²=kd", "'²' is not an index"),
        ("fusion=class_gated,entropy", "a list is written [a, b]"),
        ("fusion=[a", "fusion, line 1: "),
        ("name=2024-13-45", "name: holds a value that YAML cannot read (month"),
        ("data={[a]: b}", "data: a list or mapping cannot be a key (line 1)"),
        ("name=" + "[" * 5000, "name: nested too deeply"),
        ("distillation.losses=[].x", "distillation.losses"),
    ],
    ids=lambda text: text[:40],
)
def test_a_word_that_does_not_follow_the_config_says_what_to_write(
    word: str, expected: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        check(make_experiment({"distillation": {"losses": ["kd", "vrm"]}}, [word]))
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_words_go_where_the_yaml_has_its_keys() -> None:
    two = {"distillation": {"losses": ["kd", "vrm"]}, "fusion": "entropy"}
    experiment = make_experiment(
        two,
        [
            "distillation.losses.0.temperature=4",
            "fusion.temperature=2",  # of a list of one
            "teachers.models.name=mlp",
            "teachers.models.hidden=7",
        ],
    )
    assert experiment.distillation.losses[0].options["temperature"] == 4
    assert experiment.fusion[0].options == {"temperature": 2}
    assert experiment.teachers.models[0].options == {"hidden": 7}
    again = make_experiment(two, ["fusion=class_gated", "fusion.power=2"])
    assert again.fusion[0].options == {"power": 2}


def test_a_name_will_do_for_a_student_and_an_optimiser() -> None:
    words = ["student=resnet20", "teachers.optimizer=sgd"]
    named, whole = (
        make_experiment({}, words),
        make_experiment(
            {"student": {"model": "resnet20"}, "teachers": {"optimizer": {"name": "sgd"}}}
        ),
    )
    assert named == whole
    assert named.teachers.optimizer.lr == 0.05
    further = make_experiment({"student": "mlp"}, ["student.model.hidden=7"])
    assert further.student.model.options == {"hidden": 7}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "is empty; expected keys"),
        (b"- a", "expected a mapping of keys, such as rounds: 3, got list"),
        (b"rounds: 3\n\tname: x", "line 2: found character"),
        (b"\xff\xfe\x00", "not a text file in UTF-8 (invalid start byte at byte 0)"),
        (b"\x00\x01", "x.yaml: unacceptable character"),
        (b"[" * 5000, "nested too deeply"),
        (b"? [a]\n: b", "cannot be a key (line 1)"),
        (b"rounds: 2026-13-45", "month must be in"),
        (b"name: Gr\xf6\xdfe", "not a text file in UTF-8"),
        (b"seed: " + b"9" * 5000, ""),
        (b"seed: !!int x", ""),
        (b"seed: !!python/object:x 1", ""),
        (b"a: 1\n---\nb: 2", "but found another document"),
        (b"a: &a [*a]", "found unconstructable recursive node"),
        (
            b"a: &a [1,1,1,1,1,1,1,1,1,1]\n"
            + b"\n".join(
                f"{key}: &{key} [{','.join([f'*{old}'] * 10)}]".encode()
                for old, key in zip("abcdefgh", "bcdefghi")
            ),
            "aliases expand to more than",
        ),
    ],
    ids=range(15),
)
def test_a_file_that_is_no_config_is_one_line(
    content: bytes, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.yaml").write_bytes(content)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        load_experiment("x.yaml")
    assert expected in str(caught.value)
    assert str(caught.value).startswith("x.yaml")
    assert "\n" not in str(caught.value)


def test_paths_that_are_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a folder; expected a config file"):
        load_experiment(tmp_path)
    for path in ("x" * 5000, "/dev/null/x.yaml", str(tmp_path / "missing.yaml")):
        with pytest.raises(ConfigError, match="no config file"):
            load_experiment(path)


def test_anchors_and_merges_are_yaml_like_any_other() -> None:
    assert parse_yaml("a: &m [mlp]\nb: *m", "x") == {"a": ["mlp"], "b": ["mlp"]}
    text = "base: &base {lr: 0.1}\nteachers: {optimizer: {<<: *base, momentum: 0.5}}"
    values = parse_yaml(text, "x")
    assert values["teachers"]["optimizer"] == {"lr": 0.1, "momentum": 0.5}
