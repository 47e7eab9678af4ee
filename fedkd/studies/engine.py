"""The engine of all studies: cells x seeds, each written down as it ends, gone on with, shown.

A kind of study (`Study`) says which cells there are, runs one, and turns what came out into a
table and a page. All else is here, and the same for all kinds: the folder, what is finished, what
failed, the order of events.

config.yaml  versions.json    the resolved config, what ran it
images.json                   fingerprints of the images it began with
results.json  report.html     everything the tables show, the page
.../CELL.json                 what came out of one cell (or the error), written when it ends
.../CELL/                     what it needs besides

Events of `Notify`, beside those of each kind: `cell` (label, done, total) before a cell,
`cell_done` (label and what came out, or error) after one that was run.
"""

from __future__ import annotations

import statistics
import traceback
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from typing_extensions import TypedDict

from fedkd.config import ConfigError, Section, import_trusted, load_config, read_yaml
from fedkd.data.images import ImageSet
from fedkd.io.lock import Lock
from fedkd.io.records import Damaged, check_tree, read_json
from fedkd.knowledge.store import write_atomically
from fedkd.rounds import Interrupted, Notify, silent
from fedkd.runs.directory import new_folder, versions, write_json
from fedkd.runs.results import FILES
from fedkd.runs.signature import IMAGES, keep_images
from fedkd.studies.config import StudyConfig

Record = dict[str, Any]
RESULTS, REPORT = "results.json", "report.html"


class Failed(TypedDict):
    """What a cell leaves that raised."""

    error: str
    settings: dict[str, Any]


Config = TypeVar("Config", bound=StudyConfig)
What = TypeVar("What")


@dataclass(frozen=True, eq=False)
class Cell(Generic[What]):
    """One thing to be run.

    Attributes:
        name: Of its row; with the seed it is unique.
        seed: Of the experiment.
        path: Its place in the study's folder; its result is in `path.json`.
        experiment: What is run, with this seed.
        what: Whatever else its kind of study knows of it.
        options: What of `what` changes the result, as plain values.
    """

    name: str
    seed: int
    path: str
    experiment: Section
    what: What
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """As people call it."""
        return f"{self.name}, seed {self.seed}"

    def settings(self) -> Record:
        """All that can change the result, as plain values; stored beside it."""
        return {"experiment": _plain(self.experiment), **self.options}

    def gave(self, settings: Mapping[str, Any]) -> bool:
        """Whether a result with these settings is this cell's.

        Older settings are read as today's: a key that came since has its default, which is what
        it was like without the key.
        """
        try:
            then = _plain(type(self.experiment).model_validate(settings["experiment"]))
        except (KeyError, ValueError):  # a key that is gone, or a value no longer allowed
            return False
        return {**settings, "experiment": then} == self.settings()


def _plain(experiment: Section) -> Record:
    # Where it is run and who hears of it changes nothing, nor what is said of its energy.
    resources = {"ray_address": True, "total_cpus": True, "energy": True}
    where: dict[str, Any] = {"name": True, "output": True, "track": True, "resources": resources}
    return experiment.model_dump(mode="json", exclude=where)


Found = Mapping[tuple[str, int], Record]
"""(Row's name, seed) -> what came out of the cell, for those that ended well."""


class Study(ABC, Generic[Config, What]):
    """A kind of study."""

    config_class: ClassVar[type[StudyConfig]]
    #: Shapes of what one cell gives.
    records: ClassVar[tuple[Any, ...]] = ()

    def __init__(self, config: Config) -> None:
        self.config = config

    def check(self) -> None:
        """Raise `ConfigError` or `FileNotFoundError` for what would not run to the end.

        Called before a folder exists. What takes hours to come up is to be found here.
        """

    @cached_property
    def cells(self) -> list[Cell[What]]:
        """All cells, those of a seed in the order in which they are run."""
        return self.make_cells()

    @abstractmethod
    def make_cells(self) -> list[Cell[What]]:
        """As `cells`. Raises `ConfigError` for what does not exist."""

    def images(self, seed: int) -> Mapping[str, Mapping[str, ImageSet]]:
        """The images that results depend on: key -> purpose -> images."""
        return {}

    def begin(self, folder: Path, seed: int, notify: Notify) -> None:
        """Make what the cells of a seed share. What is raised here ends the study."""

    @abstractmethod
    def run_cell(self, folder: Path, cell: Cell[What], notify: Notify = silent) -> Record:
        """Run one cell and return what came out as plain values.

        Args:
            folder: Of the study.
            cell: One of `cells`.
            notify: Receives progress. `Interrupted` from it ends the work in good order.
        """

    @abstractmethod
    def results(self, folder: Path, found: Found) -> Record:
        """What the console's table and the page show, from what is there."""

    @abstractmethod
    def write(self, folder: Path, results: Record) -> None:
        """Write the page, and whatever other files there are."""


class Jobs(Protocol):
    """Runs cells beside each other, each by `run_one`."""

    def start(self, cell: Cell[Any]) -> None:
        """Begin with a cell as soon as there is room; does not wait."""

    def finished(self, notify: Notify) -> Iterator[tuple[Cell[Any], Record]]:
        """What came out of all that were started, as they end."""


class StudyFolder(Generic[Config]):
    """The folder of one study; create it with `new` or open it with `open`."""

    def __init__(self, path: Path, config: Config, *, trusted: bool = True) -> None:
        self.path = path
        self.config = config
        self._trusted = trusted
        #: Held by whoever runs cells.
        self.lock = Lock(path)

    @classmethod
    def new(cls, config: Config, parent: str | Path | None = None) -> StudyFolder[Config]:
        """A fresh folder under `parent` (default: the config's `output`)."""
        return cls(new_folder(parent or config.output, config.name, config), config)

    @classmethod
    def open(
        cls,
        path: str | Path,
        kind: type[Config],
        config: Config | None = None,
        *,
        trust: bool = False,
    ) -> StudyFolder[Config]:
        """An existing one, with its own config or a new one, under which it goes on.

        Args:
            path: The folder.
            kind: Of its config.
            config: The new config.
            trust: Import the plugins that its own config names: they are code.

        Raises:
            ConfigError: `path` is none, or of another kind.
        """
        path = Path(path).expanduser().resolve()
        found, command = kind_of(path), kind.model_fields["study"].default
        if found is None:
            raise ConfigError(f"{path} is not the folder of a study (it has no such config.yaml)")
        if found != command:
            raise ConfigError(f"{path} is a folder of fedkd {found}, not of fedkd {command}")
        check_tree(path)
        if config is None:
            own = load_config(kind, path / "config.yaml", plugins=False)
            folder = cls(path, own, trusted=trust)
            with suppress(ConfigError):  # whoever needs one says so; results are shown without
                folder.import_plugins()
            return folder
        folder = cls(path, config)
        with folder.lock:
            write_atomically(path / "config.yaml", config.to_yaml().encode())
            write_json(path / "versions.json", versions())
        return folder

    def import_plugins(self) -> None:
        """Import the config's plugins. Raises `ConfigError` if the folder is not trusted."""
        import_trusted(self.config.plugins, self.path, trust=self._trusted)

    def read_json(self, name: str) -> Any:
        """Read a JSON file of this study, or None if it is not there (yet)."""
        return read_json(self.path / name, FILES.get(name, Any))

    def result(self, cell: Cell[Any], kinds: tuple[Any, ...] = ()) -> Record | None:
        """What came out of this very cell; None while there is nothing (or of other settings)."""
        record: Record | None = read_json(self.file(cell), dict[str, Any])
        if record is not None and kinds:
            fit = (kind for kind in (Failed, *kinds) if kind.__required_keys__ <= record.keys())
            read_json(self.file(cell), next(fit, kinds[-1]))
        return record if record is not None and cell.gave(record.get("settings", {})) else None

    def finish(self, cell: Cell[Any], facts: Record) -> None:
        """Write down what came out."""
        file = self.file(cell)
        file.parent.mkdir(parents=True, exist_ok=True)
        about = {"name": cell.name, "seed": cell.seed, "settings": cell.settings()}
        write_json(file, {**about, **facts})

    def file(self, cell: Cell[Any]) -> Path:
        """What came out of a cell."""
        return self.path / f"{cell.path}.json"


def kind_of(path: Path) -> str | None:
    """The command whose study `path` holds ("attack"); None if it holds none."""
    file = path / "config.yaml"
    values = read_yaml(file) if file.is_file() else None
    kind = values.get("study") if isinstance(values, Mapping) else None
    return kind if isinstance(kind, str) else None


def run_study(
    study: Study[Config, What],
    folder: StudyFolder[Config],
    notify: Notify = silent,
    jobs: Jobs | None = None,
) -> Record:
    """Run what is not finished yet, and write results and page.

    A cell that raises is written down with its error, the others go on, and it is tried again
    when the study is. What was run with other settings is run again.

    Args:
        study: What is run.
        folder: Where everything is written.
        notify: Receives progress.
        jobs: Run cells beside each other; None: one after the other, here. What the cells of a seed
            share is made here in any case.

    Returns:
        The results, as in `results.json`.

    Raises:
        ConfigError: the study began with other images.
    """
    cells, seeds = study.cells, study.config.seeds
    done = 0
    with folder.lock:
        for seed in seeds:
            own = [cell for cell in cells if cell.seed == seed]
            missing = [cell for cell in own if not _is_finished(study, folder, cell)]
            if missing or seed == seeds[0]:
                for key, sets in study.images(seed).items():
                    keep_images(folder.path, key, **sets)
            if missing:
                study.begin(folder.path, seed, notify)
            for cell in own:
                notify("cell", label=cell.label, done=done, total=len(cells))
                if cell in missing and jobs is not None:
                    jobs.start(cell)
                    continue
                if cell in missing:
                    _finish(study, folder, cell, run_one(study, folder.path, cell, notify), notify)
                done += 1
        for cell, facts in jobs.finished(notify) if jobs is not None else ():
            _finish(study, folder, cell, facts, notify)
            done += 1
            notify("cell", label=cell.label, done=done, total=len(cells))
        notify("cell", label="report", done=done, total=len(cells))
        return present(study, folder)


def present(study: Study[Config, What], folder: StudyFolder[Config]) -> Record:
    """Write results and page from what is there, and return the results."""
    results = results_of(study, folder)
    write_json(folder.path / RESULTS, results)
    study.write(folder.path, results)
    return results


def results_of(study: Study[Config, What], folder: StudyFolder[Config]) -> Record:
    """The results from what is there: those of the kind, and what all kinds have."""
    found: dict[tuple[str, int], Record] = {}
    errors: dict[str, str] = {}
    classes: dict[int, Path] = {}
    cells = study.cells
    for cell in cells:
        record = folder.result(cell, study.records)
        if record is not None and "error" in record:
            errors[cell.label] = record["error"]
        elif record is not None:
            found[cell.name, cell.seed] = record
            if (scores := record.get("per_class")) is not None:
                classes.setdefault(len(scores), folder.file(cell))
    if len(classes) > 1:
        (first, file), (other, wrong), *_ = classes.items()
        raise Damaged(wrong, f"per_class has {other} classes, not the {first} of {file}")
    return {
        "study": study.config.study,
        "name": study.config.name,
        "seeds": list(study.config.seeds),
        "finished": len(found) == len(cells),
        "errors": errors,
        "tests": _tests(folder),
        **study.results(folder.path, found),
    }


def _tests(folder: StudyFolder[Any]) -> int | None:
    """How many test images accuracies are counted on; None where that differs or is not known."""
    kept = folder.read_json(IMAGES)
    known = kept.values() if isinstance(kept, dict) else ()
    sizes = {
        each["sizes"].get("test")
        for each in known
        if isinstance(each, dict) and isinstance(each.get("sizes"), dict)
    }
    size = sizes.pop() if len(sizes) == 1 else None
    return size if isinstance(size, int) else None


def spread(values: Sequence[float | None]) -> Record | None:
    """Mean and sample deviation of what is known; None if nothing is."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    std = statistics.stdev(known) if len(known) > 1 else None
    return {"mean": statistics.fmean(known), "std": std, "n": len(known)}


def _is_finished(study: Study[Any, Any], folder: StudyFolder[Any], cell: Cell[Any]) -> bool:
    record = folder.result(cell, study.records)
    return record is not None and "error" not in record


def _finish(
    study: Study[Config, What],
    folder: StudyFolder[Config],
    cell: Cell[What],
    facts: Record,
    notify: Notify,
) -> None:
    folder.finish(cell, facts)
    notify("cell_done", label=cell.label, **facts)
    write_json(folder.path / RESULTS, results_of(study, folder))


def run_one(study: Study[Config, What], folder: Path, cell: Cell[What], notify: Notify) -> Record:
    """What comes out of a cell, or the error that it raises."""
    try:
        return study.run_cell(folder, cell, notify)
    except Interrupted:
        raise
    except Exception as error:  # one cell's fault must not cost the night's other results
        first = f"{type(error).__name__}: {error}".splitlines()[0]
        return {"error": first, "traceback": traceback.format_exc()}
