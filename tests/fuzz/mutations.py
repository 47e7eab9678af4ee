"""Damage to trees of plain values, to text and to files."""

import copy
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, get_args

from pydantic import BaseModel

from fedkd.data import DATASETS, PARTITIONS, SAMPLERS
from fedkd.fusion import FUSIONS
from fedkd.knowledge.codecs import CODECS
from fedkd.losses import LOSSES
from fedkd.privacy.release import RELEASES

SMALL: list[Any] = [
    -1, 0, 1, 2, 3, 0.5, -0.5, 1e-9, math.nan, math.inf, -math.inf, 1e300, True, False, None, "",
    " ", "x", "none", "1", "3.0", "ünïcode ✂", "a\nb", [], {}, [1, 2], ["x"], [None], [[]],
    {"x": 1}, {"name": "x"}, {"name": None}, [{"name": "kd"}], "[bold]x[/]", "[/]", "{x}", "%s",
    "..", "/proc", "~", "a" * 300, {"name": "kd", "weight": math.nan}, 1 + 2**53,
]  # fmt: skip
# Values that a good config may hold, and that would keep a machine busy for hours.
LARGE: list[Any] = [10**6, 10**9, 2**63, 10**30, -(2**63), 10**400, "9" * 5000]

WORDS: list[str] = [
    "", " ", "-", "--", "=", "x=", "=x", ".", "..", "...=1", "/proc", "~", "~nobody/x",
    "\n", "a\nb", "\t", "ünïcode", "ß中", "[ ]", ":cat:",
    "\udcff\udcfe", "[bold]", "[/bold]", "[/]", "{", "}", "'", '"', "%s", "{0}",
    "*", "?", ":", "!", "&x", "*x", "a" * 300, "b" * 5000, "/" * 300, "nan", "inf", "-inf", "1e400",
    "-1", "0", "99999999999999999999", "1.5", "true", "null", "--help", "--version", "--nope",
    "-h", "-x", "--resume", "--runner", "--runner=local", "--top=-1", "--json", "a.b.c=1",
    "rounds=", "rounds=x", "rounds=[", "rounds={", "rounds: 3", "rounds==3", "seed=1e3", "..=..",
    "clients=-1", "clients=1e9", "data=1", "data.dataset.name=1", "data.dataset=[]", "student=3",
    "student=", "student.model.name.x=1", "fusion.0.x=1", "fusion.9=entropy", "fusion.-1=entropy",
    "distillation.losses.0=[]", "teachers.models.0.name={}", "output=/dev/null", "output=/proc/x",
    "name=a/b", "name=", "name=..", "name=[bold]", "base=x", "plugins=[no_such]", "plugins=x",
    "plugins=['']", "plugins=['.x']", "plugins=['a b']", "resources.device=cuda:7",
    "resources.device=x", "data.root=/dev/null", "seed=-1", "seed=99999999999999999999999",
    "a=&x [*x]", "data.test=0", "data.transfer.size=0", "!!python/object:x=1", "rounds=!!int x",
    "rounds=2026-13-45", "rounds=0x", "rounds=1_0", "rounds=12:30:45",
]  # fmt: skip


def places(tree: Any) -> list[tuple[Any, Any]]:
    """All (container, key) below `tree`."""
    found: list[tuple[Any, Any]] = []
    if isinstance(tree, dict | list):
        pairs = list(tree.items()) if isinstance(tree, dict) else list(enumerate(tree))
        for key, value in pairs:
            found.append((tree, key))
            found += places(value)
    return found


def change_tree(tree: Any, rng: Random, *, large: bool = False) -> tuple[Any, str, str]:
    """A changed copy of `tree`, the name of the mutation, and what it did."""
    tree = copy.deepcopy(tree)
    found = places(tree)
    if not found:
        return rng.choice(SMALL), "root", "another root"
    holder, key = rng.choice(found)
    values = SMALL + LARGE if large else SMALL
    way = rng.choice(
        ["value"] * 6 + ["delete", "unknown", "near", "wrap", "swap", "nest", "number"]
    )
    old = holder[key]
    if way == "value":
        holder[key] = copy.deepcopy(rng.choice(values))
    elif way == "delete":
        del holder[key]
    elif way == "unknown":
        add(
            holder, rng.choice(["x", "", "1", "nmae", "__class__", "name", "ü"]), rng.choice(values)
        )
    elif way == "near":
        if isinstance(holder, dict):
            del holder[key]
            holder[misspelt(str(key), rng)] = old
        else:
            holder[key] = misspelt(str(old), rng)
    elif way == "wrap":
        holder[key] = rng.choice([[old], {"name": old}, [old, old], {str(old)[:50]: old}, str(old)])
    elif way == "swap":
        other, place = rng.choice(found)
        holder[key] = copy.deepcopy(other[place])
    elif way == "nest":
        value: Any = 1
        for _ in range(rng.choice([5, 100])):
            value = [value] if rng.random() < 0.5 else {"a": value}
        holder[key] = value
    else:
        number = old if isinstance(old, int | float) else 1
        holder[key] = rng.choice([-number, number + 0.5, number * 2 if number < 50 else number, 0])
    return tree, way, f"{way} at {key!r}"


def plausible(root: type[BaseModel], tree: Any, rng: Random) -> tuple[Any, str]:
    """A copy of `tree` in which one key of the config has a value of its type, and what it is."""
    tree = copy.deepcopy(tree)
    keys: list[str] = []
    node, model = tree, root
    while True:
        name = rng.choice(list(model.model_fields))
        field = model.model_fields[name]
        keys.append(name)
        inner = [t for t in _types(field.annotation) if issubclass(t, BaseModel)]
        section = next((t for t in inner if t.__name__ not in _COMPONENTS), None)
        many = "tuple" in str(field.annotation) or "dict" in str(field.annotation)
        if section is None or many or rng.random() < 0.05:
            break
        if not isinstance(node.get(name), dict):
            node[name] = {}
        node, model = node[name], section
    value = _fitting(name, field.annotation, rng)
    node[name] = value
    return tree, f"{'.'.join(keys)} = {value!r}"


_COMPONENTS = ("Component", "Term")


def _types(annotation: Any) -> list[type]:
    if isinstance(annotation, type) and not get_args(annotation):
        return [annotation]
    return [found for inner in get_args(annotation) for found in _types(inner)]


def _fitting(name: str, annotation: Any, rng: Random) -> Any:
    """A value that the annotation allows, or nearly."""
    types = _types(annotation)
    literals = re.findall(r"Literal\[([^\]]*)\]", str(annotation))
    choices: list[Any] = []
    if literals:
        words = [word.strip(" '\"") for word in literals[0].split(",")]
        choices += [*words, [words[0]]]
    if bool in types:
        choices += [True, False]
    if int in types:
        choices += [0, 1, 2, 3, 5, 7]
    if float in types:
        choices += [0.0, 0.1, 0.5, 0.999, 1.0, 2.0, 30.0, 1e-6, 1e6]
    if any(t.__name__ in _COMPONENTS for t in types):
        known = _names(name)
        one, other = rng.choice(known), rng.choice(known)
        choices += [one, [one], [one, other], {"name": one}, one, [other]]
    if str in types and not literals:
        choices += ["none", "crop", "randaugment", "auto", "cpu", "x", "float32"]
    if type(None) in types:
        choices.append(None)
    return rng.choice(choices or SMALL)


def _names(key: str) -> list[str]:
    small = ["mlp", "cnn_tiny", "mixer", "cnn_small", "torchvision/resnet18", "resnet8"]
    families: dict[str, list[str]] = {
        "fusion": FUSIONS.names(), "losses": LOSSES.names(), "release": RELEASES.names(),
        "codec": CODECS.names(), "dataset": DATASETS.names(), "partition": PARTITIONS.names(),
        "sampler": SAMPLERS.names(),
        "assistants": small, "model": small, "models": small,
    }  # fmt: skip
    return families.get(key, ["x"])


def add(holder: Any, key: str, value: Any) -> None:
    """Put one more thing into a mapping or list."""
    if isinstance(holder, dict):
        holder[key] = copy.deepcopy(value)
    else:
        holder.append(copy.deepcopy(value))


def misspelt(word: str, rng: Random) -> str:
    """A word that is nearly `word`."""
    if len(word) < 2:
        return word + "x"
    at = rng.randrange(len(word) - 1)
    return rng.choice([
        word[:at] + word[at + 1 :],
        word[:at] + word[at + 1] + word[at] + word[at + 2 :],
        word + word[-1],
        word.upper(),
        word + " ",
        word.replace("_", "-") + "s",
    ])  # fmt: skip


def change_text(text: bytes, rng: Random) -> tuple[bytes, str]:
    """Damaged bytes of a text file, and the name of the mutation."""
    way = rng.choice(list(_TEXT))
    return _TEXT[way](text, rng), f"text {way}"


def _lines(text: bytes, rng: Random, change: Callable[[list[bytes], int], None]) -> bytes:
    lines = text.split(b"\n")
    change(lines, rng.randrange(len(lines)))
    return b"\n".join(lines)


def _duplicate(lines: list[bytes], at: int) -> None:
    lines.insert(at, lines[at])


def _inserted(new: bytes) -> Callable[[list[bytes], int], None]:
    return lambda lines, at: lines.insert(at, new)


_TEXT: dict[str, Callable[[bytes, Random], bytes]] = {
    "truncated": lambda t, r: t[: r.randrange(len(t) + 1)],
    "empty": lambda t, r: b"",
    "bit": lambda t, r: flipped(t, r),
    "random bytes": lambda t, r: r.randbytes(r.choice([1, 20, 3000])),
    "bytes inside": lambda t, r: _lines(t, r, _inserted(r.randbytes(9))),
    "nul": lambda t, r: t.replace(b"\n", b"\n\0", 1) + b"\0",
    "bom": lambda t, r: b"\xef\xbb\xbf" + t,
    "utf16": lambda t, r: t.decode(errors="replace").encode("utf-16"),
    "latin1": lambda t, r: t + "\nname: Größe".encode("latin-1"),
    "tabs": lambda t, r: t.replace(b"  ", b"\t"),
    "crlf": lambda t, r: t.replace(b"\n", b"\r\n"),
    "twice": lambda t, r: t + b"\n" + t,
    "documents": lambda t, r: t + b"\n---\n" + t,
    "line twice": lambda t, r: _lines(t, r, _duplicate),
    "line gone": lambda t, r: _lines(t, r, lambda lines, at: lines.__delitem__(at)),
    "anchor": lambda t, r: t + b"\nx: &x [*x]\n",
    "merge": lambda t, r: t + b"\n<<: {rounds: 1}\n",
    "merge of a list": lambda t, r: t + b"\n<<: [1]\n",
    "tag": lambda t, r: t + b"\nx: !!python/object/apply:os.getcwd []\n",
    "key of a list": lambda t, r: t + b"\n? [1, 2]\n: 3\n",
    "key of a mapping": lambda t, r: t + b"\n? {a: 1}\n: 3\n",
    "key of a number": lambda t, r: t + b"\n1: 2\n",
    "key of nothing": lambda t, r: t + b"\nnull: 2\n~: 3\n",
    "date": lambda t, r: t + b"\nseed: 2026-13-45\n",
    "time": lambda t, r: t.replace(b": 1\n", b": 2026-11-27 10:00:00\n", 1),
    "huge integer": lambda t, r: t + b"\nseed: " + b"9" * 5000 + b"\n",
    "laughs": lambda t, r: t + _laughs(),
    "deep": lambda t, r: t + b"\nx: " + b"[" * r.choice([50, 1500]) + b"\n",
    "base itself": lambda t, r: t + b"\nbase: ./x.yaml\n",
    "base folder": lambda t, r: t + b"\nbase: .\n",
    "base list": lambda t, r: t + b"\nbase: [a]\n",
    "not a mapping": lambda t, r: r.choice([b"[1, 2]", b"3", b"x", b"null", b"--- !x\n", b"- a"]),
}


def _laughs() -> bytes:
    lines = ["", "l0: &l0 [x, x, x, x, x, x, x, x]"]
    lines += [f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 8)}]" for n in range(1, 9)]
    return "\n".join([*lines, ""]).encode()


def flipped(content: bytes, rng: Random) -> bytes:
    """The content with some bits the other way round."""
    damaged = bytearray(content)
    for _ in range(rng.choice([1, 3, 30])):
        if damaged:
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def damage_file(path: Path, rng: Random) -> str:
    """Do something to one file (or folder) on disk; returns the name of the mutation."""
    way = rng.choice(
        ["gone", "empty", "cut", "bit", "random", "folder", "link to nothing", "link loop", "link"]
    )
    content = path.read_bytes() if path.is_file() else None
    if content is None or way in ("gone", "folder", "link to nothing", "link loop", "link"):
        aside = path.with_name(path.name + ".aside")
        path.rename(aside)
        if way == "link":
            path.symlink_to(aside.name)  # the same thing, elsewhere
            return "link"
        remove(aside)
        if way == "folder":
            path.mkdir()
        elif way == "link to nothing":
            path.symlink_to("no such file")
        elif way == "link loop":
            path.symlink_to(path.name)
        elif way != "gone":
            path.write_bytes(b"not a folder")
            return "file for folder"
        return way
    if way == "empty":
        content = b""
    elif way == "cut":
        content = content[: rng.randrange(len(content) + 1)]
    elif way == "bit":
        content = flipped(content, rng)
    else:
        content = rng.randbytes(rng.choice([1, 100, 5000]))
    path.write_bytes(content)
    return way


def remove(path: Path) -> None:
    """Remove a file or a folder."""
    if path.is_dir() and not path.is_symlink():
        for inner in path.iterdir():
            remove(inner)
        path.rmdir()
    else:
        os.unlink(path)  # noqa: PTH108
