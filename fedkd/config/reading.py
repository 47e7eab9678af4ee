"""From YAML files and `key=value` words to a checked experiment; the only file that reads YAML."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
import re
import sys
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from fedkd.config.messages import component_at, model_at, one_line
from fedkd.config.sections import Component, ConfigError, Experiment, Optimizer, Section
from fedkd.io.text import nearest
from fedkd.registry import NotAFunction, is_target


class _Loader(yaml.SafeLoader):
    """Safe YAML less two traps of YAML 1.1: `1e-4` is a number, a repeated key an error."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[str] = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            line = key.start_mark.line + 1
            raise ConfigError(f"a list or mapping cannot be a key (line {line})")
        if key.value in seen:
            raise ConfigError(f"key {key.value!r} is given twice (line {key.start_mark.line + 1})")
        seen.add(key.value)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
_Loader.yaml_implicit_resolvers = {
    first: list(rules) for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def parse_yaml(text: str, source: str) -> Any:
    """YAML text -> plain values. Raises `ConfigError` naming `source` and the line."""
    try:
        loader = _Loader(text)  # a SafeLoader: builds plain values only
        node = loader.get_single_node()
        if node is None:
            return None
        if _expanded(node, {}) > _MOST_VALUES:
            raise ConfigError(f"aliases expand to more than {_MOST_VALUES:,} values")
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{source}, line {mark.line + 1}" if mark else source
        problem = str(getattr(error, "problem", None) or error).splitlines()[0]
        if "'\\t'" in problem:
            problem += "; indent with spaces"
        raise ConfigError(f"{where}: {problem}") from None
    except RecursionError:
        raise ConfigError(f"{source}: nested too deeply") from None
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
    except (ValueError, TypeError, OverflowError) as error:  # a date in month 13, `!!int x`
        raise ConfigError(f"{source}: holds a value that YAML cannot read ({error})") from None


def read_yaml(file: Path, source: str | None = None) -> Any:
    """A YAML file -> plain values. Raises `ConfigError` naming it (or `source`) and the line."""
    shown = str(file) if source is None else source
    try:
        return parse_yaml(file.read_text(encoding="utf-8"), shown)
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{shown}: not a text file in UTF-8 ({error.reason} at byte {error.start})"
        ) from None
    except OSError as error:
        raise ConfigError(f"{shown}: cannot be read ({error.strerror})") from None


# Values of a config with all its aliases written out.
_MOST_VALUES = 100_000


def _expanded(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a YAML tree holds once aliases are followed."""
    if id(node) not in known:
        known[id(node)] = 1  # an alias to a node around itself: refused when it is built
        parts: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            parts = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            parts = node.value
        known[id(node)] += sum(_expanded(part, known) for part in parts)
    return known[id(node)]


Root = TypeVar("Root", bound=Section)
Values = dict[str, Any]
"""A config as YAML gives it, before it is checked."""

# Bytes of a config that a server may send; a larger one is cut, and then no valid config.
_LONGEST_CONFIG = 2**20


def load_experiment(
    path: str | Path, overrides: Sequence[str] = (), *, plugins: bool = True
) -> Experiment:
    """Read a config file and apply `key=value` overrides.

    Args:
        path: A YAML file. A relative path is looked for in the working directory first, then
            beside the installed `configs` package (so that a Flower app bundle finds its own).
        overrides: Words like `rounds=5` or `student.model=resnet20`; values are YAML.
        plugins: Import the config's plugins.

    Raises:
        ConfigError: one line on what is wrong, where, and what is allowed.
    """
    return load_config(Experiment, path, overrides, plugins=plugins)


def make_experiment(values: Mapping[str, Any], overrides: Sequence[str] = ()) -> Experiment:
    """Plain values and overrides -> a checked experiment. Raises `ConfigError`."""
    return make_config(Experiment, values, overrides)


def read_experiment(sent: bytes, *, plugins: bool = True) -> Experiment:
    """What `to_bytes` gave on another machine.

    Raises:
        ConfigError: damaged, or this version of fedkd means something else by it.
    """
    try:
        unpacker = zlib.decompressobj()
        text = unpacker.decompress(sent[8:], _LONGEST_CONFIG).decode()
    except (zlib.error, UnicodeDecodeError) as error:
        raise ConfigError(f"the server's config cannot be read ({error})") from None
    experiment = make_config(Experiment, _parse_json(text), plugins=plugins)
    if bytes.fromhex(experiment.hash[:16]) != sent[:8]:
        raise ConfigError(
            "the server's config means something else to this version of fedkd: install the "
            "server's version here"
        )
    return experiment


def _parse_json(text: str) -> Values:
    """What travels is JSON: it has no aliases, so its size is what it takes."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"the server's config cannot be read ({error})") from None
    if not isinstance(values, dict):
        raise ConfigError(f"the server's config is a {type(values).__name__}, expected a mapping")
    return values


def load_config(
    root: type[Root], path: str | Path, overrides: Sequence[str] = (), *, plugins: bool = True
) -> Root:
    """As `load_experiment`, for any outermost section.

    The key `base`, also that of an `experiment:` section, names another file, from this one's
    folder: its values hold where this file has none. Mappings are merged key by key, all else is
    replaced.
    """
    values = read_config(path)
    if "name" in root.model_fields:
        values.setdefault("name", Path(path).stem)
    return make_config(root, values, overrides, plugins=plugins)


def read_config(path: str | Path) -> Values:
    """The values of a config file and its bases, as `load_config` finds it."""
    if not isinstance(path, str | Path):
        raise ConfigError(f"path: expected a YAML file, got {path!r}")
    return _read(_find(Path(path)), str(path))


def config_text(path: str | Path) -> str:
    """A config file as a text that stands alone, to be copied.

    One on a `base` is its first comment and its values with those of the base.
    """
    text = _find(Path(path)).read_text(encoding="utf-8")
    values = read_config(path)
    if values == parse_yaml(text, str(path)):
        return text
    comment = itertools.takewhile(lambda line: line.startswith("#"), text.splitlines(keepends=True))
    return "".join(comment) + yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def make_config(
    root: type[Root],
    values: Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    plugins: bool = True,
) -> Root:
    """As `make_experiment`, for any outermost section."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"values: expected a mapping of keys, got {type(values).__name__}")
    if not isinstance(overrides, list | tuple) or not all(isinstance(w, str) for w in overrides):
        raise ConfigError(f"overrides: expected a list such as ['rounds=5'], got {overrides!r}")
    config = _validate(root, values)
    if overrides:
        config = overridden(config, overrides)
    if plugins:
        import_plugins(getattr(config, "plugins", ()))
    return config


def overridden(config: Root, overrides: Sequence[str]) -> Root:
    """A config with `key=value` words. Raises `ConfigError`.

    A default that follows from other keys is settled anew, unless a word is about it.
    """
    root = type(config)
    values = config.model_dump(mode="json")
    keys = [word.partition("=")[0].strip() for word in overrides]
    for whole in config.left_open():
        if not any(key == whole or key.startswith(f"{whole}.") for key in keys):
            *parents, last = whole.split(".")
            section = values
            for parent in parents:
                section = section[parent]
            del section[last]
    for word in overrides:
        key, separator, text = word.partition("=")
        key = key.strip()
        if not separator or not key:
            raise ConfigError(
                f"override {word!r}: expected key=value without spaces, for example rounds=5"
            )
        if not text.strip():
            raise ConfigError(f"override {word!r}: the value is missing; for none write {key}=null")
        if not all(key.split(".")):
            raise ConfigError(f"override {word!r}: {key!r} has a dot too many")
        _assign(root, values, key.split("."), parse_yaml(text, key), key)
    return _validate(root, values)


def merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> Values:
    """`old` with what `new` says; a component of another name keeps nothing of the old one."""
    result = dict(old)
    for key, value in new.items():
        before = result.get(key)
        result[key] = value
        if isinstance(before, Mapping) and isinstance(value, Mapping):
            name = before.get("name")
            if value.get("name", name) == name:
                result[key] = merged(before, value)
    return result


def validate(root: type[Root], values: Mapping[str, Any], where: str) -> Root:
    """Plain values -> the section `root` at the key `where`. Raises a one-line `ValueError`."""
    try:
        return root.model_validate(values)
    except ValidationError as error:
        raise ValueError(f"{where}.{one_line(root, error)}") from None


def _validate(root: type[Root], values: Mapping[str, Any]) -> Root:
    if (key := _with_nul(values)) is not None:
        raise ConfigError(f"{key}: holds a NUL character, which no name or path can have")
    try:
        return root.model_validate(values)
    except ValidationError as error:
        raise ConfigError(one_line(root, error)) from None


def _with_nul(value: Any, key: str = "") -> str | None:
    """The dotted key of a text with a NUL character, if there is one."""
    if isinstance(value, str):
        return key if "\0" in value else None
    if isinstance(value, list | tuple):
        value = dict(enumerate(value))
    items = value.items() if isinstance(value, Mapping) else ()
    found = (_with_nul(each, f"{key}.{name}".lstrip(".")) for name, each in items)
    return next((place for place in found if place is not None), None)


def _read(file: Path, shown: str, above: tuple[Path, ...] = ()) -> Values:
    values = read_yaml(file, shown)
    if values is None:
        raise ConfigError(f"{shown}: is empty; expected keys, such as rounds: 3")
    if not isinstance(values, dict):
        raise ConfigError(
            f"{shown}: expected a mapping of keys, such as rounds: 3, got {type(values).__name__}"
        )
    inner = values.get("experiment")
    if isinstance(inner, dict):
        values["experiment"] = _on_base(inner, file, f"{shown}: experiment", above)
    return _on_base(values, file, shown, above)


def _on_base(values: Values, file: Path, shown: str, above: tuple[Path, ...]) -> Values:
    """A section of a file, over the file that its `base` names."""
    if "base" not in values:
        return values
    base = file.parent / str(values.pop("base"))
    if not base.is_file() or base in (file, *above):
        problem = "is this file's own base" if base.is_file() else "does not exist"
        raise ConfigError(f"{shown}: base: {base} {problem}")
    return merged(_read(base, str(base), (file, *above)), values)


def _find(path: Path) -> Path:
    """`path` itself, or the config of that name shipped in the `configs` package."""
    from fedkd import configs

    shipped = Path(configs.__file__).parent
    for candidate in (path, shipped.parent / path, shipped / path):
        with contextlib.suppress(OSError):  # a name too long, a folder that may not be entered
            if candidate.is_file():
                return candidate
    with contextlib.suppress(OSError):
        if path.is_dir():
            raise ConfigError(f"{path}: is a folder; expected a config file")
    known = [str(p.relative_to(shipped.parent)) for p in sorted(shipped.rglob("*.yaml"))]
    raise ConfigError(f"no config file {str(path)!r}{nearest(str(path), known)}")


def _assign(root: type[Section], values: Values, keys: list[str], value: Any, whole: str) -> None:
    *parents, last = keys
    node: Any = values
    place: list[str] = []  # where `node` is: the keys, with 0 where a list of one was entered
    for key in parents:
        node, place = _entered(node, place, key, whole)
        if isinstance(node, list):
            number = _index(node, key, whole, place)
            place = [*place, key]
            if isinstance(node[number], str) and component_at(root, place):
                node[number] = {"name": node[number]}
            node = node[number]
        else:
            child, place = node.get(key), [*place, key]
            if isinstance(child, str) and component_at(root, place):  # `fusion: x` -> `{name: x}`
                child = {"name": child}
            node[key] = {} if child is None else child
            node = node[key]
        if not isinstance(node, dict | list):
            raise ConfigError(
                f"{whole}: {'.'.join(place)} is a value, not a section ({node!r}); nothing can be "
                "set below it"
            )
    node, place = _entered(node, place, last, whole)
    if isinstance(node, list):
        node[_index(node, last, whole, place)] = value
    elif (
        last == "name"
        and issubclass(model_at(root, place), Component | Optimizer)
        and node.get("name") != value
    ):
        node.clear()  # another component: the options of the old one do not apply to it
        node["name"] = value
    else:
        node[last] = value


def _entered(node: Any, place: list[str], key: str, whole: str) -> tuple[Any, list[str]]:
    """A list of one is entered where its index is left out, as the YAML may leave out the list."""
    if isinstance(node, list) and len(node) == 1 and not _decimal(key):
        if isinstance(node[0], str):
            node[0] = {"name": node[0]}
        if isinstance(node[0], dict):
            return node[0], [*place, "0"]
    return node, place


def _index(items: list[Any], key: str, whole: str, place: list[str]) -> int:
    if _decimal(key) and int(key) < len(items):
        return int(key)
    where = ".".join(place)
    if not items:
        raise ConfigError(f"{whole}: {where} is an empty list; set all of it: {where}=[…]")
    example = whole.replace(f"{where}.", f"{where}.0.", 1)
    remedy = (
        f"its places are 0 to {len(items) - 1}"
        if _decimal(key.removeprefix("-"))
        else f"name one, for example {example}"
    )
    raise ConfigError(f"{whole}: {key!r} is not an index of a list of {len(items)}; {remedy}")


def _decimal(key: str) -> bool:
    return key.isascii() and key.isdecimal() and len(key) < 10


def import_plugins(names: Sequence[str]) -> None:
    """Import users' modules, which register themselves, and admit functions that make models.

    Raises:
        ConfigError: it does not exist, fails, or is hidden by an installed module of its name; or
            a module has no such function.
    """
    for name in names:
        try:
            if is_target(name):
                from fedkd.models.targets import admit  # which loads torch

                admit(name)
            else:
                importlib.import_module(name)
        except NotAFunction as error:
            raise ConfigError(f"plugins: {error}") from None
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"plugins: cannot import {name!r} ({error}); it must be importable from the "
                "working directory or installed"
            ) from None
        except Exception as error:  # it is the user's code: anything may come up
            where = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
            raise ConfigError(
                f"plugins: importing {name!r} fails: {type(error).__name__}: {error}{where}"
            ) from error
        first = name.partition(":")[0].split(".")[0]
        here = [Path.cwd() / f"{first}.py", Path.cwd() / first / "__init__.py"]
        file = getattr(sys.modules[first], "__file__", None)
        beside = [path for path in here if path.is_file()]
        if beside and (file is None or not any(path.samefile(file) for path in beside)):
            raise ConfigError(
                f"plugins: {name!r} is {file or 'a built-in module'}, which "
                f"hides {beside[0]}: give your module another name"
            )


def _imported(name: str) -> bool:
    if not is_target(name):
        return name in sys.modules
    from fedkd.models.targets import admitted

    return admitted(name)


def import_trusted(names: Sequence[str], where: Path, *, trust: bool) -> None:
    """Import the plugins that a folder names, which may be somebody else's.

    Args:
        names: The plugins.
        where: The folder.
        trust: Whether its owner is trusted; if not, those alone will do that are imported already.

    Raises:
        ConfigError: one is needed and may not be imported; or as `import_plugins`.
    """
    unknown = [name for name in names if not _imported(name)]
    if unknown and not trust:
        raise ConfigError(
            f"{where}: its plugin {unknown[0]!r} is not imported: it is code that whoever made the "
            "folder has chosen; if you trust it, add --trust"
        )
    import_plugins(names)
