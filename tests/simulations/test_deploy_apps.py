"""A node runs the code that its owner accepted, and unpacks no other."""

import hashlib
import io
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tomli_w
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.config import parse_config_args
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode import start_client_internal as flower

from fedkd.config import ConfigError
from fedkd.simulations.deploy import supernode
from fedkd.simulations.deploy.apps import app_hash, checkout_hash, read_apps
from fedkd.simulations.deploy.folder import accept, read_settings
from fedkd.simulations.deploy.quoting import quoted
from fedkd.simulations.deploy.supernode import arguments_of, check_app, guard

PROJECT = {"project": {"name": "app", "version": "1"}}
FILES = {
    "pyproject.toml": tomli_w.dumps(PROJECT),
    "fedkd/a.py": "x = 1\n",
    "simulations/b.py": "",
    ".info/CONTENT": "whatever",
}
HOSTILE = [
    "/d/$(touch X)", "/d/`touch X`", "/d/a b", "/d/o'brien", '/d/"q"', "/d/a\nb", "/d/\\", "/d/é",
    "/d/;touch X;", "/d/'\"$(touch X)\"'", "/d/#x", "/d/a=b", "/d/x.toml", "/d/\U0001f600", "~/x",
]  # fmt: skip


def bundle(files: dict[str, str], pack: int = zipfile.ZIP_DEFLATED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", pack) as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return stream.getvalue()


def test_the_hash_is_of_names_and_contents_and_not_of_how_they_are_packed() -> None:
    same = dict(reversed(FILES.items())) | {".info/CONTENT": "other", "pyproject.toml": (
        '[project]\nversion = "1"\n\nname = "app"'
    )}  # fmt: skip
    assert app_hash(bundle(FILES)) == app_hash(bundle(same, zipfile.ZIP_STORED))


@pytest.mark.parametrize(
    "change",
    [
        {"fedkd/a.py": "x = 2\n"},
        {"fedkd/c.py": ""},
        {"fedkd/a.py": None, "fedkd/A.py": "x = 1\n"},
        {"simulations/b.py": None},
        {"pyproject.toml": tomli_w.dumps(PROJECT | {"tool": {"x": 1}})},
        {".info/CONTENT": None, ".info/content": "whatever"},
    ],
)
def test_any_other_content_has_another_hash(change: dict[str, str | None]) -> None:
    merged = {**FILES, **change}
    other = {name: text for name, text in merged.items() if text is not None}
    assert app_hash(bundle(other)) != app_hash(bundle(FILES))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_bundle_that_shows_one_thing_and_unpacks_another_has_no_hash() -> None:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("fedkd/a.py", "good")
        archive.writestr("fedkd/a.py", "evil")
    huge = bundle({"a.py": "0" * (101 * 2**20)})
    odd = [bundle({name: ""}) for name in ("../a.py", "/a.py", "a/../../b", "a\\b", "a\nb")]
    for wrong in (stream.getvalue(), huge, b"", b"PK", bundle(FILES)[:-30], *odd):
        with pytest.raises(ValueError, match=r"^the bundle"):
            app_hash(wrong)
    with pytest.raises(ValueError, match="pyproject"):
        app_hash(bundle({"pyproject.toml": "["}))


def test_the_checkout_is_hashed_as_flower_bundles_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no checkout"):
        checkout_hash(tmp_path)
    root = Path(__file__).parents[2]
    found = checkout_hash(root)
    assert read_apps(found) == {found}


@pytest.mark.parametrize("words", ["", "any", "*", "0" * 63, "A" * 64, f"{'0' * 64} x"])
def test_apps_are_hashes(words: str) -> None:
    with pytest.raises(ConfigError, match=r"APPS in settings\.env"):
        read_apps(words)


def test_a_bundle_is_taken_at_its_content_not_at_its_name() -> None:
    good, evil = bundle(FILES), bundle(FILES | {"fedkd/a.py": "evil"})
    accepted = {app_hash(good)}
    check_app(good, hashlib.sha256(good).hexdigest(), accepted)
    with pytest.raises(supernode.AppRefused, match=app_hash(evil)):
        check_app(evil, hashlib.sha256(evil).hexdigest(), accepted)
    for content, name in ((evil, good), (good, evil)):
        with pytest.raises(supernode.AppRefused, match="not the one it names"):
            check_app(content, hashlib.sha256(name).hexdigest(), accepted)
    with pytest.raises(supernode.AppRefused, match="cannot be read"):
        check_app(b"PK", hashlib.sha256(b"PK").hexdigest(), accepted)


class State:
    """Flower's node state, as far as an unknown run touches it."""

    def __init__(self) -> None:
        self.stored: list[Any] = []

    def get_run(self, run_id: int) -> None:
        return None

    def __getattr__(self, name: str) -> Any:
        return lambda *words, **named: self.stored.append((name, words, named))


def test_flowers_supernode_answers_for_an_app_that_is_not_accepted_and_keeps_none_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Flower's own function, guarded: the app comes with an unknown run, and is never stored.
    original = flower._pull_and_store_message
    monkeypatch.setattr(flower, "_pull_and_store_message", original)
    guard({app_hash(bundle(FILES))})
    evil = bundle(FILES | {"fedkd/a.py": "evil"})
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1
    message = Message(
        RecordDict({"job": ConfigRecord()}), dst_node_id=7, message_type="train", ttl=60
    )
    message.metadata.__dict__["_message_id"] = "m"
    replies: list[Message] = []
    monkeypatch.setattr(flower, "_insert_message", lambda reply, *_: replies.append(reply))
    state = State()
    fab = SimpleNamespace(content=evil, hash_str=hashlib.sha256(evil).hexdigest(), verifications={})
    run_id = flower._pull_and_store_message(
        state=state,
        object_store=None,
        node_config={},
        receive=lambda: (message, None),
        get_run=lambda run: SimpleNamespace(fab_hash=fab.hash_str),
        get_fab=lambda name, run: fab,
        pull_object=None,
        confirm_message_received=None,
        trusted_entities=None,
    )
    assert run_id == message.metadata.run_id
    (reply,) = replies
    assert "is none of APPS" in reply.error.reason
    assert state.stored == []


def test_a_flower_that_cannot_be_guarded_is_not_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(message: object) -> None: ...

    monkeypatch.setattr(flower, "_pull_and_store_message", other)
    with pytest.raises(ConfigError, match="install the server's"):
        guard({"0" * 64})


# -- settings ------------------------------------------------------------------------------


def settings(**changes: str) -> dict[str, str]:
    return {
        "SUPERLINK": "localhost:8443", "PARTITION_ID": "1", "NUM_PARTITIONS": "3",
        "STATE": "state", "POLICY": "policy.yaml",
    } | changes  # fmt: skip


@pytest.mark.parametrize("path", HOSTILE)
def test_any_path_reaches_the_client_app_as_it_is(path: str) -> None:
    words = arguments_of(settings(DATA=path, STATE=path), Path("/n"))
    config = parse_config_args([words[words.index("--node-config") + 1]])
    whole = str(Path("/n") / Path(path).expanduser())
    assert config == {
        "partition-id": 1, "num-partitions": 3, "state-dir": whole, "policy": "/n/policy.yaml",
        "key": "/n/node.key", "data": whole,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"STATE": ""}, "STATE"),
        ({"POLICY": ""}, "POLICY"),
        ({"PARTITION_ID": "1 a=2"}, "PARTITION_ID"),
    ],
)
def test_a_setting_that_is_missing_or_wrong_is_named(change: dict[str, str], name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        arguments_of(settings(**change), Path("/n"))


@pytest.mark.parametrize("text", ["", *HOSTILE, "\x00\x1f\x7f", "a\\", "\\U00000041"])
def test_quoted_is_what_flower_reads_back(text: str) -> None:
    both = f"a={quoted(text)} b={quoted(text + 'x')}"
    assert parse_config_args([both]) == {"a": text, "b": text + "x"}


def test_accepting_an_app_changes_one_line(tmp_path: Path) -> None:
    path = tmp_path / "settings.env"
    path.write_text("# it's a node\nSTATE='a b'\nAPPS=old\nPOLICY=policy.yaml\n")
    assert accept(tmp_path, "new", keep=False) == ("new",)
    assert accept(tmp_path, "next", keep=True) == ("new", "next")
    assert accept(tmp_path, "next", keep=True) == ("new", "next")
    assert path.read_text() == ("# it's a node\nSTATE='a b'\nAPPS='new next'\nPOLICY=policy.yaml\n")
    assert read_settings(path)["APPS"] == "new next"
    assert path.stat().st_mode & 0o777 == 0o600
