"""One maker per kind of input: a random generator and a folder become a case."""

import contextlib
import io
import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import yaml
from PIL import Image

from fedkd.config import Experiment
from fedkd.studies.central.config import DistillConfig
from tests.fuzz.engine import ROOT, Case
from tests.fuzz.material import CONFIGS, FEDERATION, Material
from tests.fuzz.mutations import (
    SMALL,
    WORDS,
    change_text,
    change_tree,
    damage_file,
    misspelt,
    plausible,
)

Maker = Callable[[Random, Path, Material], Case]
SHIPPED = sorted((ROOT / "configs").rglob("*.yaml"))
_VERBS = {
    "distill": "distill", "parity": "distill", "study": "distill", "compare": "compare",
    "comparison": "compare", "ablate": "ablate", "ablation": "ablate", "attack": "attack",
    "sweep": "privacy sweep",
}  # fmt: skip


# -- command lines ---------------------------------------------------------------------------------


def command_line(rng: Random, home: Path, material: Material) -> Case:
    """A good command whose words were changed."""
    for name in ("run", "study", "node"):
        shutil.copytree(material.folder(name), home / name)
    words = rng.choice(_good_commands(rng, material))
    changes, ways = [" ".join(words)], []
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        way = _change_words(words, rng, material)
        ways.append(f"words {way}")
    (home / "here.yaml").write_text(yaml.safe_dump(FEDERATION))
    return Case(words, home, changes, ways)


def _good_commands(rng: Random, material: Material) -> list[list[str]]:
    config = {name: str(path) for name, path in material.configs.items()}
    run, study = "run", "study"
    local = ["--runner", "local"]
    picture = str(material.picture)
    shipped = str(rng.choice(SHIPPED).relative_to(ROOT))
    quick = ["rounds=1", "student.model=mlp"]
    return [
        ["run", config["run"], *local, "name=other"],
        ["run", config["run"], *local, *quick],
        ["run", "here.yaml", *local, "distillation.losses=[ce]", "fusion=[uniform]"],
        ["run", "--resume", run, *local],
        ["distill", config["study"], "seeds=[1]"],
        ["distill", "--resume", study],
        ["config", "show", shipped],
        ["config", "show", config["run"], "rounds=5", "student.model=resnet20"],
        ["config", "show", "quickstart.yaml", "clients=3", "fusion.0=entropy"],
        ["partition", config["run"], "clients=3", "--picture", "picture.png"],
        ["partition", "here.yaml", "data.partition={name: dirichlet, alpha: 1}"],
        ["list", rng.choice(["models", "losses", "fusions", "releases", "codecs", "baselines",
                             "attacks", "datasets", "partitions"])],
        ["list", "models", "--plugin", "json"],
        ["report", run],
        ["predict", run, picture, picture, "--top", "2"],
        ["predict", run, picture],
        ["export", run, "--format", "torch", "--output", "student.pt2"],
        ["attack", config["attack"], "rules=[uniform]"],
        ["ablate", config["ablation"], "seeds=[0]"],
        ["audit", run, "--shadows", "2", "--canaries", "4", "--client", "0"],
        ["audit", run, "--shadows", "0", "--canaries", "4", "--epsilon", "5", "--delta", "1e-3"],
        ["compare", config["comparison"], "seeds=[0]", "only=[local_only]"],
        ["contribution", run, "--all-rounds", "--permutations", "3"],
        ["quarantine", run],
        ["quarantine", run, "--lift", "1"],
        ["status", run, "--json"],
        ["status", run],
        ["unlearn", run, "--client", "1", "--quick"],
        ["deploy", "init", "out", "--nodes", "2", "--host", "localhost", "--config", config["run"]],
        ["deploy", "init", "out", "--nodes", "2", "--host", "127.0.0.1", "--own-data", "--deal",
         "--config", config["run"], "--port", "9000", "--days", "3", "--data", "x"],
        ["deploy", "check", "node", "--print"],
        ["privacy", "sweep", config["sweep"], "--epsilon", "inf"],
        ["privacy", "plan", config["private"], "rounds=2"],
    ]  # fmt: skip


def _change_words(words: list[str], rng: Random, material: Material) -> str:
    way = rng.choice(
        ["word"] * 4 + ["insert"] * 4 + ["drop", "twice", "swap", "near", "value", "value", "path"]
    )
    at = rng.randrange(len(words)) if words else 0
    if not words or way == "insert":
        words.insert(rng.randrange(len(words) + 1), rng.choice(WORDS))
    elif way == "word":
        words[at] = rng.choice(WORDS)
    elif way == "drop":
        del words[at]
    elif way == "twice":
        words.insert(at, words[at])
    elif way == "swap":
        other = rng.randrange(len(words))
        words[at], words[other] = words[other], words[at]
    elif way == "near":
        words[at] = misspelt(words[at], rng)
    elif way == "value":
        config = rng.choice(["run", "study", "comparison", "ablation", "sweep", "attack"])
        key = rng.choice(keys_of(CONFIGS[config][1]))
        value = yaml.safe_dump(rng.choice(SMALL), default_flow_style=True).split("\n...")[0]
        words.append(f"{key}={value.strip()}")
    else:
        words[at] = str(rng.choice([
            *material.configs.values(), material.picture, "run", "run/summary.json", "study",
            "node", "/dev/null", "/proc/self/mem", "/nonexistent/x", "run/config.yaml",
            "run/checkpoints",
        ]))  # fmt: skip
    return way


def keys_of(tree: Any, prefix: str = "") -> list[str]:
    """Dotted keys of everything in a config."""
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
    found = []
    for key, value in pairs:
        found.append(f"{prefix}{key}")
        if isinstance(value, dict | list):
            found += keys_of(value, f"{prefix}{key}.")
    return found


# -- configs ---------------------------------------------------------------------------------------


def config(rng: Random, home: Path, material: Material) -> Case:
    """A config whose values or whose bytes were changed, for a command that reads it."""
    if rng.random() < 0.35:
        source = rng.choice(SHIPPED)
        values, verb = yaml.safe_load(source.read_text()), "show"
        source_name = str(source.relative_to(ROOT))
        for section in (values, values.get("experiment", {})):
            if "base" in section:
                section["base"] = str((source.parent / section["base"]).resolve())
    else:
        source_name = rng.choice(["run", "run", *CONFIGS])
        verb, values = CONFIGS[source_name]
        if rng.random() < 0.3:
            verb = "show"
    changes, ways = [source_name], []
    for _ in range(rng.choice([0, 1, 1, 1, 2, 3])):
        if verb in ("run", "show", "distill") and rng.random() < 0.5:
            values, what = plausible(
                DistillConfig if "methods" in values else Experiment, values, rng
            )
            way = "plausible"
        else:
            values, way, what = change_tree(values, rng, large=verb == "show")
        changes.append(what)
        ways.append(f"tree {way}")
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True).encode(
        "utf-8", "surrogateescape"
    )
    if not ways or rng.random() < 0.15:
        text, way = change_text(text, rng)
        changes.append(way)
        ways.append(way)
    (home / "x.yaml").write_bytes(text)
    if verb == "show":
        words = [["config", "show"], ["privacy", "plan"], ["config", "show"]][rng.randrange(3)]
        words = [*words, "x.yaml"]
        room = source_name.split("/")[1] if "/" in source_name else source_name
        if room in _VERBS and rng.random() < 0.8:
            # The command itself: with a data set that is not there it ends before it trains.
            place = "experiment.data" if room == "attack" else "data"
            words = [*_VERBS[room].split(), "x.yaml", f"{place}.dataset=cifar100"]
            words.append(f"{place}.root=/nonexistent")
    else:
        words = [*verb.split(), "x.yaml"]
        if verb == "run":
            words = rng.choice([[*words, "--runner", "local"], ["partition", "x.yaml"]])
    return Case(words, home, changes, ways)


# -- pictures and arrays ---------------------------------------------------------------------------


def pictures(rng: Random, home: Path, material: Material) -> Case:
    """A folder of pictures in which some things are wrong."""
    folder = home / "pictures"
    names = ["cat", "dog", "emu"]
    inside = rng.choice([".", ".", "train", "train"])
    for name in names:
        (folder / inside / name).mkdir(parents=True)
        for number in range(12):
            pixels = np.random.default_rng([number, len(name)]).integers(0, 255, (9, 9, 3))
            picture = Image.fromarray(pixels.astype(np.uint8))
            picture.save(folder / inside / name / f"{number}.png")
    if inside == "train" and rng.random() < 0.8:
        shutil.copytree(folder / inside, folder / "test")
    ways = []
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        way = rng.choice(list(_PICTURES))
        ways.append(f"pictures {way}")
        place = folder / inside / rng.choice(names)
        if not place.is_dir():
            place.unlink(missing_ok=True)
            place.mkdir(parents=True)
        with contextlib.suppress(OSError):  # two changes may exclude each other
            _PICTURES[way](rng, place)
    dataset = {"name": "image_folder", "path": "pictures", "size": 8}
    return _with_data(rng, home, dataset, ways)


def _with_data(rng: Random, home: Path, dataset: dict[str, Any], ways: list[str]) -> Case:
    if rng.random() < 0.15:
        key = rng.choice([*dataset, "grey", "root", "classes"])
        dataset[key] = rng.choice(SMALL)
        ways.append("data set option")
    values = {**FEDERATION, "data": {**FEDERATION["data"], "dataset": dataset}}
    values["data"].pop("test")
    (home / "x.yaml").write_text(yaml.safe_dump(values))
    words = rng.choice([["partition", "x.yaml"], ["run", "x.yaml", "--runner", "local"]])
    return Case(words, home, [str(dataset)], ways)


def _copied(place: Path, target: Path) -> None:
    """A copy of a folder; links stay links, and pipes stay behind."""
    left = shutil.ignore_patterns("pipe.png")
    shutil.copytree(place, target, symlinks=True, ignore=left, dirs_exist_ok=True)


def _saved(picture: Image.Image, name: str, **how: Any) -> Callable[[Random, Path], None]:
    return lambda rng, place: picture.save(place / name, **how)


def _exif(rng: Random, place: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = rng.choice([0, 3, 6, 8, 99])
    Image.new("RGB", (9, 7)).save(place / "turned.jpg", exif=exif)


def _many_pixels(rng: Random, place: Path) -> None:
    Image.new("1", (20000, 15000)).save(place / "bomb.png")


def _claimed_pixels(rng: Random, place: Path) -> None:
    """A few bytes that claim 4 billion pixels."""
    import struct
    import zlib

    def chunk(kind: bytes, body: bytes) -> bytes:
        checked = kind + body
        return struct.pack(">I", len(body)) + checked + struct.pack(">I", zlib.crc32(checked))

    head = struct.pack(">IIBBBBB", 65000, 65000, 8, 2, 0, 0, 0)
    content = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    (place / "claim.png").write_bytes(b"\x89PNG\r\n\x1a\n" + content)


def _odd_name(rng: Random, place: Path) -> None:
    name = rng.choice(["a\nb.png", "[bold].png", " .png", "ü✂.png", os.fsdecode(b"\xff\xfe.png"),
                       "-x.png", "a" * 200 + ".png", "x.PNG", "x.png.png", "=1.png"])  # fmt: skip
    Image.new("RGB", (8, 8)).save(place / name, format="PNG")


def _odd_class(rng: Random, place: Path) -> None:
    name = rng.choice(["a\nb", "[bold]", " ", "ü✂", os.fsdecode(b"\xff\xfe"), "-x", "a" * 200,
                       "x=1", "[ ]", ":cat:", "train", "test", "1", "01", "CAT",
                       "cat "])  # fmt: skip
    place.rename(place.with_name(name)) if rng.random() < 0.5 else _copied(
        place, place.with_name(name)
    )


def _loop(rng: Random, place: Path) -> None:
    target = rng.choice([".", "..", "loop", "../..", "no such thing", "/"])
    name = rng.choice(["loop", "loop.png"])
    if target != "/" or name == "loop.png":
        (place / name).symlink_to(target)


def _damaged(rng: Random, place: Path) -> None:
    files = sorted(place.rglob("*.png"))
    if files:
        damage_file(rng.choice(files), rng)


def _others_gone(rng: Random, place: Path) -> None:
    for other in place.parent.iterdir():
        if other != place and other.is_dir() and not other.is_symlink():
            shutil.rmtree(other)


def _file_for_folder(rng: Random, place: Path) -> None:
    shutil.rmtree(place)
    place.write_bytes(b"x")


def _pipe(rng: Random, place: Path) -> None:
    os.mkfifo(place / "pipe.png")


_PICTURES: dict[str, Callable[[Random, Path], None]] = {
    "damaged": _damaged,
    "damaged too": _damaged,
    "no pictures": lambda r, p: [f.unlink() for f in p.glob("*.png")] and None,
    "text": lambda r, p: (p / "readme.txt").write_text("x") and None,
    "text as picture": lambda r, p: (p / "x.png").write_text("x") and None,
    "hidden file": lambda r, p: (p / ".DS_Store").write_bytes(b"x") and None,
    "hidden picture": lambda r, p: (p / "._0.png").write_bytes(b"x") and None,
    "hidden folder": lambda r, p: _copied(p, p.parent / ".cache") and None,
    "hidden folder inside": lambda r, p: (p / ".thumbs").mkdir(exist_ok=True),
    "empty class": lambda r, p: (p.parent / "ant").mkdir(exist_ok=True),
    "folder inside": lambda r, p: (p / "more").mkdir(exist_ok=True),
    "folder as picture": lambda r, p: (p / "folder.png").mkdir(exist_ok=True),
    "one class": _others_gone,
    "grey": _saved(Image.new("L", (8, 8)), "grey.png"),
    "alpha": _saved(Image.new("RGBA", (8, 8)), "alpha.png"),
    "palette": _saved(Image.new("P", (8, 8)), "palette.gif"),
    "bilevel": _saved(Image.new("1", (8, 8)), "bilevel.png"),
    "cmyk": _saved(Image.new("CMYK", (8, 8)), "cmyk.jpg"),
    "16 bits": _saved(Image.new("I;16", (8, 8)), "deep.png"),
    "32 bits": _saved(Image.new("I", (8, 8)), "deep.tif"),
    "float": _saved(Image.new("F", (8, 8)), "float.tiff"),
    "one pixel": _saved(Image.new("RGB", (1, 1)), "one.png"),
    "long": _saved(Image.new("RGB", (1, 4000)), "long.png"),
    "wrong suffix": _saved(Image.new("RGB", (8, 8)), "wrong.jpg", format="PNG"),
    "animation": _saved(
        Image.new("P", (8, 8)),
        "moves.gif",
        save_all=True,
        append_images=[Image.new("P", (8, 8), 1)],
    ),
    "exif": _exif,
    "many pixels": _many_pixels,
    "claimed pixels": _claimed_pixels,
    "odd name": _odd_name,
    "odd class": _odd_class,
    "loop": _loop,
    "pipe": _pipe,
    "split folders": lambda r, p: (
        [_copied(p, p.parent / s / p.name) for s in ("train", "test")] and None
    ),
    "no folder": lambda r, p: shutil.rmtree(p.parent),
    "file for folder": _file_for_folder,
}


def arrays(rng: Random, home: Path, material: Material) -> Case:
    """An .npz file of which something is wrong."""
    numbers = np.random.default_rng(0)
    content: dict[str, Any] = {
        "x_train": numbers.integers(0, 256, (60, 8, 8, 3), dtype=np.uint8),
        "y_train": np.arange(60) % 3,
        "x_test": numbers.integers(0, 256, (24, 8, 8, 3), dtype=np.uint8),
        "y_test": np.arange(24) % 3,
        "classes": np.array(["cat", "dog", "emu"]),
    }
    if rng.random() < 0.4:
        content = {"x": content["x_train"], "y": content["y_train"]}
    ways = []
    for _ in range(rng.choice([0, 1, 1, 1, 2])):
        way, key = rng.choice(list(_ARRAYS)), rng.choice(list(content) or ["x"])
        ways.append(f"array {way}")
        old = content.get(key, np.arange(3))
        try:
            new = _ARRAYS[way](old, rng)
        except (ValueError, TypeError, IndexError):  # no such change to this array
            new = None
        if new is None:
            content.pop(key, None)
        else:
            content[key] = new
    file = home / "data.npz"
    np.savez(file, **content)
    if not ways or rng.random() < 0.2:
        way = rng.choice([*_FILES, "damaged", "damaged"])
        ways.append(f"npz {way}")
        if way == "damaged":
            damage_file(file, rng)
        else:
            _FILES[way](file)
    return _with_data(rng, home, {"name": "npz", "path": "data.npz"}, ways)


def _nan(array: np.ndarray, rng: Random) -> np.ndarray:
    changed = array.astype(float)
    changed.flat[0] = rng.choice([np.nan, np.inf, -1, 0.5, 1e300])
    return changed


def _one_label(value: Any) -> Callable[[np.ndarray, Random], np.ndarray]:
    def change(array: np.ndarray, rng: Random) -> np.ndarray:
        changed = array.astype(np.int64)
        changed.flat[0] = value
        return changed

    return change


_ARRAYS: dict[str, Callable[[np.ndarray, Random], Any]] = {
    "gone": lambda a, r: None,
    "empty": lambda a, r: a[:0],
    "one row": lambda a, r: a[:1],
    "short": lambda a, r: a[:-1],
    "scalar": lambda a, r: np.array(7),
    "flat": lambda a, r: a.reshape(-1),
    "column": lambda a, r: a.reshape(len(a), -1),
    "one more axis": lambda a, r: a[..., None],
    "one more axis in front": lambda a, r: a[None],
    "one hot": lambda a, r: np.eye(3)[a.reshape(len(a), -1)[:, 0] % 3],
    "float": lambda a, r: a.astype(np.float32) / 255,
    "half": lambda a, r: a.astype(np.float16),
    "double": lambda a, r: a.astype(np.float64),
    "nan": _nan,
    "complex": lambda a, r: a.astype(complex),
    "bool": lambda a, r: a.astype(bool),
    "16 bits": lambda a, r: a.astype(np.uint16) * 257,
    "64 bits": lambda a, r: a.astype(np.uint64) + np.uint64(2**63),
    "int8": lambda a, r: a.astype(np.int8),
    "objects": lambda a, r: a.astype(object),
    "strings": lambda a, r: a.astype(str),
    "bytes": lambda a, r: a.astype("S"),
    "dates": lambda a, r: a.astype("datetime64[s]"),
    "records": lambda a, r: np.zeros(len(a), [("a", "i4"), ("b", "f4")]),
    "masked": lambda a, r: np.ma.masked_array(a, a == a.flat[0]),
    "big endian": lambda a, r: a.astype(">i8"),
    "fortran": lambda a, r: np.asfortranarray(a),
    "negative": lambda a, r: -a.astype(np.int64),
    "labels from 1": lambda a, r: a.astype(np.int64) + 1,
    "gap": lambda a, r: a.astype(np.int64) * 2,
    "255": _one_label(255),
    "-1": _one_label(-1),
    "huge label": _one_label(2**62),
    "record numbers": lambda a, r: np.arange(len(a)),
    "constant": lambda a, r: np.zeros_like(a),
    "two channels": lambda a, r: a[..., :2],
    "channels first": lambda a, r: np.moveaxis(a, -1, 1),
    "oblong": lambda a, r: a[:, :4],
    "no pixels": lambda a, r: a[:, :0],
    "same names": lambda a, r: np.array(["cat", "cat", "emu"]),
    "odd names": lambda a, r: np.array(["a\nb", "[bold]", ""]),
    "numbers as names": lambda a, r: np.array([1, 2, 3]),
    "two names": lambda a, r: np.array(["cat", "dog"]),
    "nested names": lambda a, r: np.array([["cat", "dog", "emu"]]),
}


def _as_npy(file: Path) -> None:
    with file.open("wb") as out:
        np.save(out, np.arange(3))


def _as_pickle(file: Path) -> None:
    with file.open("wb") as out:
        np.savez(out, x_train=np.array([{}, None], dtype=object), allow_pickle=True)


def _as_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def _zip(file: Path, members: dict[str, bytes]) -> None:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def _header(shape: tuple[int, ...], dtype: str = "|u1") -> bytes:
    buffer = io.BytesIO()
    header = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue()


_FILES: dict[str, Callable[[Path], None]] = {
    "npy": _as_npy,
    "pickle": _as_pickle,
    "text": lambda f: f.write_text("x,y\n1,2\n") and None,
    "empty zip": lambda f: _zip(f, {}),
    "zip of text": lambda f: _zip(f, {"x.txt": b"hello", "x_train": b"no array"}),
    "claims much": lambda f: _zip(f, {"x.npy": _header((2**40, 8, 8)), "y.npy": _header((3,))}),
    "claims negative": lambda f: _zip(f, {"x.npy": _header((-1, 8, 8)), "y.npy": b""}),
    "bomb": lambda f: _zip(f, {"x.npy": _header((2**28,)) + bytes(2**28)}),
    "bad header": lambda f: _zip(f, {"x.npy": b"\x93NUMPY\x01\x00\x76\x00{'descr': nope"}),
    "no npy": lambda f: _zip(f, {"x_train.npy": b"", "y_train.npy": b"\x93NUMPY"}),
    "folder": _as_folder,
}


# -- folders of the commands -----------------------------------------------------------------------


def run_directory(rng: Random, home: Path, material: Material) -> Case:
    """A finished run in which something is damaged, and a command on it."""
    folder = home / "run"
    shutil.copytree(material.folder("run"), folder)
    shutil.copy(material.picture, home / "picture.png")
    changes, ways = _damage(folder, rng)
    words = rng.choice([
        ["status", "run"], ["status", "run", "--json"], ["status", "run"],
        ["report", "run"], ["report", "run"], ["predict", "run", "picture.png"],
        ["predict", "run", "picture.png"], ["export", "run"], ["contribution", "run"],
        ["contribution", "run", "--all-rounds"], ["contribution", "run", "--students"],
        ["audit", "run", "--shadows", "2", "--canaries", "4"],
        ["audit", "run", "--shadows", "0", "--canaries", "8"],
        ["unlearn", "run", "--client", "1"], ["unlearn", "run", "--client", "0", "--quick"],
        ["unlearn", "run", "--client", "1", "--erase", "--yes"],
        ["quarantine", "run"], ["quarantine", "run", "--lift", "0"],
        ["run", "--resume", "run", "--runner", "local"],
        ["run", "--resume", "run", "--runner", "local"],
    ])  # fmt: skip
    return Case(words, home, changes, ways)


def other_folder(rng: Random, home: Path, material: Material) -> Case:
    """The same for studies, comparisons, sweeps, attack studies and nodes."""
    name, commands = rng.choice([
        ("study", [["report"], ["distill", "--resume"], ["status"], ["predict", "?"]]),
        ("comparison", [["report"], ["compare", "--resume"], ["ablate", "--resume"], ["status"]]),
        ("sweep", [["report"], ["privacy", "sweep", "--resume"]]),
        ("attack", [["report"], ["attack", "--resume"], ["attack", "--resume"]]),
        ("node", [["deploy", "check"], ["deploy", "check", "--print"], ["status"]]),
    ])  # fmt: skip
    folder = home / name
    shutil.copytree(material.folder(name), folder)
    changes, ways = _damage(folder, rng)
    words = [*rng.choice(commands), name]
    if words[1] == "?":
        words = ["predict", name, str(material.picture)]
    return Case(words, home, [name, *changes], ways)


def _damage(folder: Path, rng: Random) -> tuple[list[str], list[str]]:
    changes, ways = [], []
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        found = sorted(folder.rglob("*"))
        texts = [
            p for p in found if p.suffix in (".json", ".jsonl", ".yaml", ".env") and p.is_file()
        ]
        if not found:
            break
        way = rng.choice(["file", "values", "values", "text", "strange"])
        if way == "file" or not texts:
            path = rng.choice(found)
            where = str(path.relative_to(folder))
            way = damage_file(path, rng)
        else:
            path = rng.choice(texts)
            where = str(path.relative_to(folder))
            if way == "values":
                way = _change_values(path, rng)
            elif way == "text":
                content, way = change_text(path.read_bytes(), rng)
                path.write_bytes(content)
            else:
                path = rng.choice([p for p in found if p.is_dir()] or [folder])
                name = rng.choice(["round-x", "client-x", "round-0009.pt", "round-0009",
                                   "client-0009", "x.json", "seed9", "round-.pt",
                                   "teacher.pt", ".x"])  # fmt: skip
                where = str((path / name).relative_to(folder))
                if (path / name).exists():
                    damage_file(path / name, rng)
                elif rng.random() < 0.5:
                    (path / name).mkdir()
                else:
                    (path / name).write_bytes(b"x")
        changes.append(f"{where}: {way}")
        ways.append(f"folder {way}")
    return changes, ways


def _change_values(path: Path, rng: Random) -> str:
    """Good JSON or YAML with other values in it."""
    text = path.read_text(errors="replace")
    try:
        if path.suffix == ".yaml":
            values, way, _ = change_tree(yaml.safe_load(text), rng)
            path.write_text(yaml.safe_dump(values, sort_keys=False))
        elif path.suffix == ".json":
            values, way, _ = change_tree(json.loads(text), rng, large=True)
            path.write_text(json.dumps(values))
        else:
            lines = text.splitlines()
            at = rng.randrange(len(lines))
            values, way, _ = change_tree(json.loads(lines[at]), rng, large=True)
            lines[at] = json.dumps(values)
            path.write_text("\n".join(lines) + "\n")
    except (ValueError, yaml.YAMLError):  # damaged before
        content, way = change_text(path.read_bytes(), rng)
        path.write_bytes(content)
        return way
    return f"values {way}"


MAKERS: dict[str, Maker] = {
    "words": command_line,
    "config": config,
    "pictures": pictures,
    "arrays": arrays,
    "run": run_directory,
    "folder": other_folder,
}
