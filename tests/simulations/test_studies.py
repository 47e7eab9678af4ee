"""What all kinds of studies have in common: resume, failures, folder, page, exit codes."""

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml

from fedkd.build import check
from fedkd.config import ConfigError, load_config, make_config
from fedkd.rounds import Interrupted
from fedkd.runs.signature import IMAGES
from fedkd.simulations.cli.study import STUDIES, kind_named
from fedkd.studies.central.study import check_names
from fedkd.studies.engine import Cell, Record, Study, StudyFolder, kind_of, run_study
from tests.conftest import TINY

SMALL = {**TINY, "rounds": 1, "teachers": {"models": ["mlp"], "epochs": 1}, "fusion": ["uniform"]}
VOTES = {"release": {"name": "gnmax", "min_votes": 3}, "distillation.losses": ["ce"]}
TRAINING = {"epochs": 1, "batch_size": 16, "augment": "none"}
CENTRAL = {
    "data": {"dataset": {"name": "synthetic", "classes": 3, "size": 8, "per_class": 20}},
    "teachers": {"models": ["mlp"], **TRAINING},
    "student": {"model": "mlp"},
    "distillation": TRAINING,
    "resources": {"device": "cpu"},
}
CONFIGS: dict[str, dict[str, Any]] = {
    "ablate": {"experiment": SMALL, "grid": {"fusion": ["uniform", "entropy"]}},
    "attack": {"experiment": SMALL, "rules": ["class_gated"], "attacks": ["nan"]},
    "compare": {"experiment": SMALL, "methods": ["fedkd", "local_only"]},
    "distill": {"experiment": CENTRAL, "methods": {"kd": ["ce", "kd"]}},
    "privacy sweep": {"experiment": SMALL, "epsilons": ["inf", 5], "mechanisms": {"v": VOTES}},
}
# Messages of fedkd hold the path of the client's folder, so their size depends on it.
CLOCK = ("seconds", "wall", "images_per_second", "up", "down", "memory", "joules", "grams")


def numbers(value: Any) -> Any:
    """Results without what depends on the clock and the folder."""
    if isinstance(value, dict):
        return {key: numbers(item) for key, item in value.items() if key not in CLOCK}
    return [numbers(item) for item in value] if isinstance(value, list) else value


ROOT = Path(__file__).parents[2] / "configs"
FOLDERS = {"parity": "distill", "privacy": "privacy sweep"}
SHIPPED = [
    file
    for folder in ("ablate", "attack", "compare", "distill", "parity", "privacy")
    for file in sorted((ROOT / folder).rglob("*.yaml"))
    if not file.name.startswith("_")
]


@pytest.mark.smoke
@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_every_shipped_study_is_valid(file: Path) -> None:
    folder = file.relative_to(ROOT).parts[0]
    kind = kind_named(FOLDERS.get(folder, folder)).study
    config = load_config(kind.config_class, file)
    cells = kind(config).cells
    assert cells
    if kind is kind_named("distill").study:
        check_names(config)
        return
    for cell in cells:
        if cell.seed == cells[0].seed:
            check(cell.experiment)


class Listener:
    """Patches a kind's `run_cell`: counts the cells that are run, and makes the first one fail."""

    def __init__(self, study: Study[Any, Any], fault: Exception | None = None) -> None:
        self.ran: list[str] = []
        self.kind, self.fault = type(study), fault

    def __enter__(self) -> list[str]:
        real, fault, ran = self.kind.run_cell, self.fault, self.ran

        def run_cell(study: Any, folder: Path, cell: Cell[Any], *rest: Any) -> Record:
            ran.append(cell.label)
            if fault is not None and len(ran) == 1:
                raise fault
            return real(study, folder, cell, *rest)

        self.patch = mock.patch.object(self.kind, "run_cell", run_cell)
        self.patch.__enter__()
        return ran

    def __exit__(self, *_: object) -> None:
        self.patch.__exit__(None, None, None)


def opened(command: str, path: Path) -> tuple[Study[Any, Any], StudyFolder[Any]]:
    """As a command does it: the study of a folder."""
    kind = kind_named(command).study
    folder = StudyFolder.open(path, kind.config_class)
    return kind(folder.config), folder


@pytest.fixture(scope="module", params=STUDIES)
def command(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def finished(command: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished study of each kind."""
    study = made(command)
    folder = StudyFolder.new(study.config, tmp_path_factory.mktemp("studies"))
    assert run_study(study, folder)["finished"]
    return folder.path


def made(command: str, *overrides: str) -> Study[Any, Any]:
    kind = kind_named(command).study
    return kind(make_config(kind.config_class, CONFIGS[command], overrides))


def test_one_fault_costs_one_cell_and_an_interrupted_study_ends_the_same(
    command: str, finished: Path, tmp_path: Path
) -> None:
    study, whole = opened(command, finished)
    folder = StudyFolder.new(study.config, tmp_path)

    def stop(event: str, **facts: Any) -> None:
        if event == "cell" and facts["done"] == len(study.cells) - 1:
            raise Interrupted

    fault = RuntimeError("no such luck\nsecond line")
    with Listener(study, fault) as ran, pytest.raises(Interrupted):
        run_study(study, folder, stop)
    first, last = study.cells[0], study.cells[-1]
    assert ran == [cell.label for cell in study.cells[:-1]]
    failed = folder.result(first)
    assert failed["error"] == "RuntimeError: no such luck"
    assert "second line" in failed["traceback"]
    begun = json.loads((folder.path / "results.json").read_text())
    assert (begun["finished"], [*begun["errors"]]) == (False, [first.label])

    again, folder = opened(command, folder.path)
    with Listener(again) as ran:
        found = run_study(again, folder)
    assert ran == [first.label, last.label]
    assert (found["finished"], found["errors"]) == (True, {})
    assert (folder.path / "report.html").is_file()
    before = json.loads((whole.path / "results.json").read_text())
    if command != "privacy sweep":  # whose noise nobody can predict
        assert numbers(json.loads(json.dumps(found))) == numbers(before)


def test_only_what_a_new_config_changes_is_run_again(command: str, finished: Path) -> None:
    study, folder = opened(command, finished)
    more = made(command, "seeds=[0,1]")
    assert [more.cells[0].gave(cell.settings()) for cell in study.cells[:1]] == [True]
    missing = [c.label for c in more.cells if folder.result(c, more.records) is None]
    assert missing == [cell.label for cell in more.cells if cell.seed == 1]


def test_a_command_ends_with_a_table_paths_and_its_code(
    command: str, finished: Path, fedkd: Any, tmp_path: Path
) -> None:
    words = command.split()
    (finished / "report.html").unlink()
    code, out, err = fedkd(*words, "--resume", finished)
    assert (code, err) == (0, "")
    assert f"report  {finished / 'report.html'}" in out
    (finished / "report.html").unlink()
    assert fedkd("report", finished)[0] == 0
    assert (finished / "report.html").is_file()

    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(CONFIGS[command]))
    study, _ = opened(command, finished)
    with Listener(study, RuntimeError("no such luck")):
        code, out, err = fedkd(*words, file, "name=mine")
    (folder,) = (tmp_path / "runs").glob("mine-*")
    go_on = f"go on with: fedkd {command} --resume {folder}"
    assert (code, err) == (1, f"1 of {len(study.cells)} failed; {go_on}\n")
    assert "no such luck" in out
    with Listener(study, Interrupted()):
        code, _, err = fedkd(*words, "--resume", folder)
    assert (code, err) == (130, f"interrupted; {go_on}\n")


def test_what_cannot_be_gone_on_with_is_one_line(command: str, finished: Path, fedkd: Any) -> None:
    other = next(name for name in STUDIES if name != command)
    for words, expected in (
        ([], "give a config file, e.g. fedkd"),
        (["--resume", finished.parent], "is not the folder of a study"),
        (["seeds=1", "--resume", finished], "the config file is missing before"),
    ):
        code, out, err = fedkd(*command.split(), *words)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert expected in err
    code, _, err = fedkd(*other.split(), "--resume", finished)
    assert (code, kind_of(finished)) == (2, command)
    assert f"is a folder of fedkd {command}, not of fedkd {other}" in err


def test_a_study_does_not_go_on_with_other_images(command: str, finished: Path) -> None:
    study, folder = opened(command, finished)
    file = folder.path / IMAGES
    kept = file.read_text()
    for key, other, expected in (
        ("test", "0" * 16, "the test images are not those that the study began with"),
        ("classes", ["ash", "oak"], r"classes are not those .*\(2 then, . now; .*gone: ash, oak"),
    ):
        file.write_text(json.dumps({k: {**v, key: other} for k, v in json.loads(kept).items()}))
        with pytest.raises(ConfigError, match=expected):
            run_study(study, folder)
    file.write_text("[]")
    with pytest.raises(ConfigError, match="damaged"):
        run_study(study, folder)
    file.write_text(kept)


def test_a_key_of_the_experiment_is_refused_where_it_used_to_be(command: str) -> None:
    with pytest.raises(ConfigError, match=r"write experiment\.student"):
        made(command, "student.model=mlp")
    with pytest.raises(ConfigError, match="seeds: 1 is listed twice"):
        made(command, "seeds=[1,1]")
