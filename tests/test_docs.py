"""The documentation is true: its Python runs, its tables name everything, its links lead somewhere.

Blocks of one page share their names, in order. A block whose first line is a comment with a file
name (`# my_losses.py`) becomes that module; the tests in it are run.
"""

import ast
import inspect
import re
import sys
import types
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from fedkd.attacks import ATTACKS
from fedkd.data.views import AUGMENTATIONS
from fedkd.fusion import FUSIONS
from fedkd.knowledge import kinds as kinds_module
from fedkd.knowledge.kinds import Kind, Logits, VirtualLogits
from fedkd.losses import LOSSES
from fedkd.simulations.baselines import BASELINES
from fedkd.training.evaluation import evaluate
from tests.tables import PATTERNS, REGISTRIES, filled, rows

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
METHODS, LOSS_PAGE = (
    (ROOT / "docs" / page).read_text(encoding="utf-8") for page in ("methods.md", "losses.md")
)

_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_FILE = re.compile(r"# ([\w/]+)\.py\n")


def _blocks(page: Path) -> list[tuple[int, str]]:
    """(line in the page, code) of each Python block."""
    text = page.read_text(encoding="utf-8")
    return [(text.count("\n", 0, m.start(1)), m[1]) for m in _BLOCK.finditer(text)]


def _the_student_beats_its_teachers(names: dict[str, Any]) -> None:
    """An example that distils ends with a student better than the best of its teachers."""
    test = names["data"].test
    student = evaluate(names["student"], test)
    assert student > max(evaluate(teacher, test) for teacher in names["teachers"])


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(p, marks=[pytest.mark.smoke] if p.name == "CONTRIBUTING.md" else [])
        for p in PAGES
        if _blocks(p)
    ],
    ids=lambda p: p.name,
)
def test_python_blocks_run(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # What a page registers is forgotten after it.
    for registry in (*REGISTRIES.values(), ATTACKS, BASELINES):
        registry.names()
        monkeypatch.setattr(registry, "_members", dict(registry._members))
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "page"}
    for line, code in _blocks(page):
        # Empty lines in front make a traceback point into the page.
        compiled = compile("\n" * line + code, str(page), "exec")
        if (file := _FILE.match(code)) is None:
            exec(compiled, names)
            if "fedkd.train_teacher(" in code and "fedkd.train_student(" in code:
                _the_student_beats_its_teachers(names)
            continue
        place = file[1].replace("/", ".")
        linked = place.startswith(("simulations.", "strategies."))  # into fedkd/
        module = types.ModuleType(f"fedkd.{place}" if linked else place)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        exec(compiled, module.__dict__)
        for name, member in vars(module).copy().items():
            if name.startswith("test_"):
                member()


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_tables_hold_what_the_registries_know(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert filled(text) == text, "run: python -m tests.tables"


@pytest.mark.parametrize("section", REGISTRIES)
def test_every_registry_has_its_table(section: str) -> None:
    assert set(rows(LOSS_PAGE + METHODS, section)) - set(PATTERNS) == set(
        REGISTRIES[section].names()
    )


def test_every_kind_of_knowledge_has_its_row() -> None:
    kinds = [k for k in vars(kinds_module).values() if inspect.isclass(k) and issubclass(k, Kind)]
    final = {kind for kind in kinds if not inspect.isabstract(kind)}
    found = re.findall(r"^\| `(\w+\(.*?\))` \|", METHODS.split("\n## Fusion rules")[0], re.M)
    assert {row.split("(")[0] for row in found} == {kind.__name__ for kind in final}
    for row in found:
        eval(row, vars(kinds_module))  # the options exist


def test_augmentations_have_their_rows() -> None:
    assert list(rows(METHODS, "Augmentations")) == list(AUGMENTATIONS)


def test_needs_and_bytes_of_losses_are_right() -> None:
    for name, (_, _, needs, _, size, *_) in rows(LOSS_PAGE, "Losses").items():
        loss = LOSSES.create(name)
        assert needs.split(";")[0].count("`") == 2 * len(loss.needs), name
        if {type(kind) for kind in loss.needs} <= {Logits, VirtualLogits}:  # two bytes a number
            expected = f"{2 * len(loss.needs)}C" if loss.needs else "0"
            assert size.split(";")[0] == expected, name


def test_the_page_calls_each_loss_with_each_option() -> None:
    trees = [ast.parse(code) for _, code in _blocks(ROOT / "docs" / "losses.md")]
    calls: dict[str, list[set[str | None]]] = {}
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            given = {keyword.arg for keyword in node.keywords}
            calls.setdefault(node.func.id, []).append(given)
    for name in LOSSES.names():
        function = f"{name}_loss"
        module = sys.modules[LOSSES.get(name).__module__]
        known = inspect.signature(getattr(module, function)).parameters.values()
        expected = {p.name for p in known if p.kind is p.KEYWORD_ONLY}
        assert any(expected <= call for call in calls.get(function, ())), function


def test_each_option_is_described_once() -> None:
    for registry in (LOSSES, FUSIONS):
        for name in registry.names():
            member = registry.get(name)
            formula = getattr(sys.modules[member.__module__], f"{name}_loss", member)
            taken = [field.name for field in fields(getattr(member, "Options", member))]
            for option in registry.options(name):
                text = (formula if option in taken else member).__doc__ or ""
                count = len(re.findall(rf"^ +{option}: (?!As in|See)", text, re.M))
                assert count == 1, (
                    f"{registry.family} {name!r}: {option} is described {count} times"
                )


def test_a_module_is_called_as_its_name() -> None:
    for registry in (LOSSES, FUSIONS):
        for name in registry.names():
            assert registry.get(name).__module__.rsplit(".", 1)[1] == name


@pytest.mark.smoke
def test_design_lists_the_floors_and_doors_that_are_tested() -> None:
    from tests.test_architecture import DOORS, FLOORS

    design = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    picture: dict[int, set[str]] = {}
    number = 0
    for line in design.split("## Rooms and floors")[1].split("```")[1].splitlines():
        if match := re.match(r" *(\d+)  (\S.*)", line):
            number = int(match[1])
        picture.setdefault(number, set()).update(line.split())
    for number, rooms in enumerate(FLOORS, start=1):
        assert set(rooms) - {"configs"} <= picture[number], f"floor {number} in docs/design.md"
    for library, doors in DOORS.items():
        if library == "onnx":  # comes behind onnxscript; a door that nobody uses yet
            continue
        (row,) = [r for r in design.splitlines() if re.match(rf"\| ([\w, ]*, )?{library}\b", r)]
        assert all(f"`{door}`" in row for door in doors), f"docs/design.md: doors of {library}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.M)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        place = page.parent / file if file else page
        assert place.exists(), f"{page.name} links to {target}"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", place.read_text(encoding="utf-8"), re.M)
            known = {re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles}
            assert anchor in known, f"{page.name} links to {target}"
