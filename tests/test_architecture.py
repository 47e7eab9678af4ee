"""Floors and doors: imports go down only, and each outside library enters where it may.

Walks the syntax trees, so imports inside functions and under TYPE_CHECKING count as well. The
pictures in docs/design.md show the same floors and doors.
"""

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("fedkd", "strategies", "simulations", "configs")

# Rooms from the ground up. A room may import from floors below its own, and from itself.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("io", "randomness", "configs"),
    ("functional", "registry"),
    ("data",),
    ("models",),
    ("knowledge",),
    ("losses", "fusion"),
    ("training",),
    ("config", "distillation"),
    ("privacy",),
    ("build",),
    ("runs", "attacks", "api"),
    ("rounds", "reporting"),
    ("strategies", "studies"),
    ("simulations",),
    ("__main__",),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS, start=1) for room in rooms}

# The package's face imports public names on first use, from any floor. Nobody below may use it.
FACE = "fedkd"

# Where each outside library may be imported: files, or folders that end with a slash.
EVERYWHERE = {"torch", "numpy", "typing_extensions"}
DOORS: dict[str, tuple[str, ...]] = {
    "yaml": ("fedkd/config/",),
    "pydantic": (
        "fedkd/config/",
        "fedkd/io/records.py",
        "fedkd/runs/events.py",
        "fedkd/studies/",
        "fedkd/privacy/policy.py",
        "fedkd/registry.py",
        "simulations/compare/config.py",
        "simulations/compare/grid.py",
        "simulations/compare/sweep.py",
    ),
    "torchvision": ("fedkd/data/vision.py",),
    "timm": ("fedkd/models/foundation.py",),
    "open_clip": ("fedkd/models/foundation.py",),
    "datasets": ("fedkd/data/hugging_face.py",),
    "pyarrow": ("fedkd/data/hugging_face.py",),
    "transformers": ("fedkd/models/hub.py",),
    "safetensors": ("fedkd/io/tensors.py",),
    "flwr": ("strategies/", "simulations/"),
    "ray": ("simulations/ray.py", "simulations/jobs.py"),
    "sklearn": (
        "fedkd/data/datasets.py",
        "fedkd/losses/min_norm.py",
        "fedkd/functional/noisy_labels.py",
        "fedkd/privacy/release/cells.py",
    ),
    "scipy": (
        "fedkd/data/datasets.py",
        "fedkd/losses/min_norm.py",
        "fedkd/privacy/release/gaussian.py",
        "fedkd/studies/audit/",
    ),
    "peft": ("fedkd/models/peft.py",),
    "wandb": ("fedkd/runs/trackers/wandb.py",),
    "mlflow": ("fedkd/runs/trackers/mlflow.py",),
    "opacus": ("fedkd/privacy/clipping.py", "fedkd/privacy/accounting.py"),
    "onnx": ("fedkd/runs/onnx_files.py",),
    "onnxruntime": ("fedkd/runs/onnx_files.py",),
    "onnxscript": ("fedkd/runs/onnx_files.py",),
    "matplotlib": ("fedkd/reporting/", "fedkd/studies/", "simulations/compare/figures.py"),
    "jinja2": ("fedkd/reporting/page.py",),
    "markupsafe": ("fedkd/reporting/page.py",),
    "PIL": ("fedkd/data/pictures.py", "fedkd/data/transfer.py"),
    "cryptography": (
        "fedkd/privacy/masking.py",
        "fedkd/privacy/noise.py",
        "simulations/deploy/keys.py",
    ),
    "httpx": ("simulations/deploy/gate.py",),
    "starlette": ("simulations/deploy/gate.py",),
    "uvicorn": ("simulations/deploy/gate.py",),
    "typer": ("simulations/cli/",),
    "click": ("simulations/cli/",),
    "rich": ("simulations/cli/",),
}

# Known violations, (importing module, imported module), each with its reason. Keep it empty.
EXCEPTIONS: set[tuple[str, str]] = set()


def _name(path: Path) -> str:
    """`strategies/nodes.py` is `fedkd.strategies.nodes`, by a link in `fedkd/`."""
    parts = ("fedkd", *path.relative_to(ROOT).with_suffix("").parts)
    parts = parts[1:] if parts[1] == "fedkd" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {
    _name(path): path
    for folder in FOLDERS
    for path in (ROOT / folder).rglob("*.py")
    if path.resolve() == path
}


def _imported(path: Path) -> Iterator[str]:
    """Full names of all modules a file imports, also by `importlib.import_module("name")`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in FILES else node.module
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            (argument,) = node.args
            if isinstance(argument, ast.Constant):
                yield str(argument.value)


IMPORTS = {name: set(_imported(path)) for name, path in FILES.items()}
ARROWS = sorted(
    (module, target)
    for module, targets in IMPORTS.items()
    for target in targets
    if target.split(".")[0] == "fedkd"
)


def _room(module: str) -> str:
    """`fedkd.losses.dkd` -> `losses`; `fedkd.strategies.records` -> `strategies`."""
    parts = module.split(".")
    return parts[1] if parts[0] == "fedkd" and len(parts) > 1 else parts[0]


def test_every_room_has_a_floor() -> None:
    rooms = {_room(module) for module in FILES} - {FACE}
    assert rooms == set(FLOOR)


def test_every_import_of_ours_exists() -> None:
    assert [arrow for arrow in ARROWS if arrow[1] not in FILES] == []


def test_imports_go_down_only() -> None:
    upward = [
        f"{module} (floor {FLOOR[_room(module)]}) -> {target} (floor {FLOOR[_room(target)]})"
        for module, target in ARROWS
        if FACE not in (module, target)
        and (module, target) not in EXCEPTIONS
        and _room(module) != _room(target)
        and FLOOR[_room(target)] >= FLOOR[_room(module)]
    ]
    assert upward == []


def test_the_library_never_imports_the_runners() -> None:
    runners = ("strategies", "simulations")
    assert [
        (module, target)
        for module, target in ARROWS
        if _room(target) in runners and _room(module) not in (*runners, "__main__")
    ] == []
    assert [a for a in ARROWS if _room(a[0]) == "strategies" and _room(a[1]) == "simulations"] == []


def test_the_library_does_not_import_its_own_face() -> None:
    runners = ("strategies", "simulations", "__main__")
    assert [m for m, target in ARROWS if target == FACE and _room(m) not in runners] == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph: dict[str, set[str]] = {module: set() for module in FILES}
    for module, target in ARROWS:
        if module != FACE and (module, target) not in EXCEPTIONS:
            graph[module].add(target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_outside_libraries_enter_by_their_doors() -> None:
    unknown = []
    for module, targets in IMPORTS.items():
        file = FILES[module].relative_to(ROOT).as_posix()
        for target in sorted(targets):
            library = target.split(".")[0]
            known = library in {"fedkd", *EVERYWHERE, *sys.stdlib_module_names}
            if not known and not file.startswith(DOORS.get(library, ("-",))):
                unknown.append(f"{file} imports {target}")
    assert unknown == []


def test_exceptions_are_still_needed() -> None:
    assert set(ARROWS) >= EXCEPTIONS


@pytest.mark.parametrize("word", ["exec", "eval", "__import__"])
def test_nothing_hides_an_import(word: str) -> None:
    calls = [
        f"{module}: {word}"
        for module, path in FILES.items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == word
    ]
    assert calls == []
