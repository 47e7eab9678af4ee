"""The `fedkd` command: a thin layer over the Python API."""

from __future__ import annotations

import io
import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import click
import typer
from rich.table import Table

import configs
from fedkd import __version__
from fedkd.config import ConfigError, Experiment
from fedkd.io.text import PlainFormatter
from simulations.cli.ablate import ablate
from simulations.cli.arguments import Config, Overrides, RunPath, StudentPath, TeacherWeights
from simulations.cli.attack import attack
from simulations.cli.audit import audit
from simulations.cli.compare import compare
from simulations.cli.configs import load, open_run
from simulations.cli.contribution import contribution
from simulations.cli.deploy import app as deploy_app
from simulations.cli.privacy import app as privacy_app
from simulations.cli.quarantine import quarantine
from simulations.cli.screen import screen
from simulations.cli.status import status
from simulations.cli.unlearn import unlearn
from simulations.cli.usage import explain, run_app
from simulations.failures import INTERRUPTED, OUTPUT_GONE, USER_ERROR, failure_of, noted, one_line

app = typer.Typer(
    help="Distil many private teachers into one small student.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
config_app = typer.Typer(help="Look at configs.", no_args_is_help=True)
app.add_typer(config_app, name="config")
app.add_typer(deploy_app, name="deploy")
app.add_typer(privacy_app, name="privacy")
app.command()(attack)
app.command()(ablate)
app.command()(audit)
app.command()(compare)
app.command()(contribution)
app.command()(quarantine)
app.command()(status)
app.command()(unlearn)


@app.command()
def run(
    config: Annotated[str | None, typer.Argument(help="a YAML file")] = None,
    overrides: Overrides = None,
    resume: Annotated[Path | None, typer.Option(help="go on with this run directory")] = None,
    runner: Annotated[
        str, typer.Option(help="ray (Flower's simulation runtime) or local (one process)")
    ] = "ray",
    trust: TeacherWeights = False,
) -> None:
    """Run an experiment: teachers, knowledge, fusion, student, report."""
    from fedkd.rounds import Interrupted, experiment_context
    from fedkd.runs.directory import RunDirectory
    from fedkd.runs.events import ClientsErased
    from simulations.cli.tables import run_tables
    from simulations.machine import check_machine

    if runner not in ("ray", "local"):
        raise ConfigError(f"--runner: expected ray or local, got {runner!r}")
    if resume is not None:
        if config is not None:
            raise ConfigError("--resume takes its config from the run; give no config beside it")
        directory = open_run(resume, trust=trust)
        directory.import_plugins()
        directory.check_config()
        if directory.events(ClientsErased):
            raise ConfigError(
                f"{directory.path}: clients were erased from this run, so it cannot go on; go on "
                "with the run that fedkd unlearn made in its place"
            )
    elif config is None:
        raise ConfigError("give a config file, e.g. fedkd run configs/quickstart.yaml")
    else:
        experiment = load(Experiment, config, overrides or [], "run")
        check_machine(experiment, workers=runner == "ray")
        experiment_context(experiment)  # what is wrong is said before there is a folder
        if experiment.promises and experiment.settled:
            keys = ", ".join(experiment.settled)
            print(f"note: not given, so set to what the promise allows: {keys}", file=sys.stderr)
        directory = RunDirectory.new(experiment)
    trusted = " --trust" if directory.experiment.plugins else ""
    go_on = f"fedkd run --resume {directory.path}{trusted}"
    try:
        if resume is not None and _is_finished(directory):
            print(f"finished already, after {directory.experiment.rounds} rounds: nothing is left")
        else:
            with directory.lock, noted(directory.log, go_on):
                _run(directory, runner)
    except Interrupted:
        print(f"interrupted; go on with: {go_on}", file=sys.stderr)
        sys.exit(130)
    console = screen()
    console.print(run_tables(directory))
    console.print(f"run     {directory.path}", soft_wrap=True, highlight=False, markup=False)
    console.print(
        f"report  {directory.path / 'report.html'}", soft_wrap=True, highlight=False, markup=False
    )


@app.command()
def distill(
    config: Annotated[
        str | None, typer.Argument(help="a YAML file, e.g. configs/distill/digits.yaml")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, e.g. only=[kd,dkd] recipe.epochs=5")
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="go on with this study's folder")] = None,
    trust: TeacherWeights = False,
) -> None:
    """Compare distillation methods in one place: teachers, a student per method and seed."""
    from fedkd.rounds import Interrupted
    from fedkd.studies.central.config import Study
    from fedkd.studies.central.folder import StudyFolder
    from fedkd.studies.central.report import methods_table
    from fedkd.studies.central.study import prepare, run_study
    from fedkd.studies.central.training import Images
    from simulations.cli.progress import ProgressView
    from simulations.cli.tables import console_table

    if resume is not None:
        if config is not None:
            raise ConfigError("--resume takes its config from the folder; give no config beside it")
        folder = StudyFolder.open(resume, trust=trust)
        folder.import_plugins()
        images = Images.load(folder.study)
    elif config is None:
        raise ConfigError("give a config file, e.g. fedkd distill configs/distill/digits.yaml")
    else:
        study = load(Study, config, overrides or [], "distill")
        images = prepare(study)  # what is missing or does not fit is said before a folder exists
        folder = StudyFolder.new(study)
    console = screen()
    trusted = " --trust" if folder.study.plugins else ""
    try:
        with folder.lock, ProgressView(console) as view:
            results = run_study(folder, images, view)
    except Interrupted:
        go_on = f"fedkd distill --resume {folder.path}{trusted}"
        print(f"interrupted; go on with: {go_on}", file=sys.stderr)
        sys.exit(130)
    console.print(console_table(methods_table(results)))
    console.print(f"study   {folder.path}", soft_wrap=True, highlight=False, markup=False)
    console.print(
        f"report  {folder.path / 'report.html'}", soft_wrap=True, highlight=False, markup=False
    )


def _run(directory: Any, runner: str) -> None:
    from simulations.cli.progress import ProgressView
    from simulations.cli.screen import quiet_descriptors

    with (
        quiet_descriptors(directory.log) as console,
        ProgressView(console) as view,
    ):
        if runner == "local":
            from simulations.local import run_local

            run_local(directory.experiment, run=directory, notify=view)
        else:
            from simulations.ray import run_ray

            run_ray(directory.experiment, run=directory, notify=view)


def _is_finished(directory: Any) -> bool:
    from fedkd.runs.events import RoundFinished

    rounds = directory.events(RoundFinished)
    done = rounds and rounds[-1].round >= directory.experiment.rounds
    return bool(done) and directory.read_json("summary.json") is not None


@config_app.command("show")
def config_show(config: Config, overrides: Overrides = None) -> None:
    """Print the resolved config, every default written out."""
    from fedkd.build import check

    experiment = load(Experiment, config, overrides or [], "config show")
    check(experiment)
    sys.stdout.write(experiment.to_yaml())


@app.command()
def partition(
    config: Config,
    overrides: Overrides = None,
    picture: Annotated[
        Path | None, typer.Option(help="also write a picture (png, svg, pdf)")
    ] = None,
) -> None:
    """Show who holds which classes: a table, and a picture if asked."""
    from fedkd.build import build_data, check
    from fedkd.reporting.run_figures import partition_figure
    from simulations.cli.tables import partition_table

    if picture is not None:
        _check_picture(picture)
    experiment = load(Experiment, config, overrides or [], "partition")
    check(experiment)
    data = build_data(experiment)
    counts = data.class_counts()
    console = screen()
    console.print(partition_table(counts, data.classes))
    console.print(
        f"transfer set: {len(data.transfer.images):,} images, "
        f"{'labelled' if data.transfer.labelled else 'unlabelled'}, "
        f"fingerprint {data.transfer.fingerprint}; test: {len(data.test):,} images"
    )
    if picture is not None:
        try:
            with warnings.catch_warnings():  # an odd letter is a box in the picture, no more
                warnings.filterwarnings("ignore", message="Glyph .* missing")
                partition_figure(counts, data.classes).savefig(picture, dpi=150)
        except (OSError, ValueError) as error:
            raise ConfigError(f"--picture: {error}") from None
        console.print(f"picture: {picture}", soft_wrap=True, markup=False)


def _check_picture(file: Path) -> None:
    """Refuse a file that cannot be written, before the work: matplotlib adds endings silently."""
    if file.suffix.lower() not in (endings := (".png", ".svg", ".pdf", ".jpg", ".webp")):
        raise ConfigError(f"--picture: {file}: expected a file that ends with {', '.join(endings)}")
    if not file.parent.is_dir():
        raise ConfigError(f"--picture: {file}: there is no folder {file.parent}")
    if file.is_dir():
        raise ConfigError(f"--picture: {file}: is a folder")


@app.command("list")
def list_things(
    what: Annotated[str, typer.Argument(help="models, losses, fusions, releases, codecs, …")],
    plugin: Annotated[list[str] | None, typer.Option(help="import this module first")] = None,
) -> None:
    """List what there is, one line each."""
    from fedkd.attacks import ATTACKS
    from fedkd.config import import_plugins
    from fedkd.data import DATASETS, PARTITIONS
    from fedkd.fusion import FUSIONS
    from fedkd.knowledge.codecs import CODECS
    from fedkd.losses import LOSSES
    from fedkd.models import MODELS
    from fedkd.privacy.release import RELEASES
    from fedkd.registry import Registry, nearest
    from simulations.baselines import BASELINES

    families: dict[str, Registry[Any]] = {
        "models": MODELS,
        "losses": LOSSES,
        "fusions": FUSIONS,
        "releases": RELEASES,
        "codecs": CODECS,
        "baselines": BASELINES,
        "attacks": ATTACKS,
        "datasets": DATASETS,
        "partitions": PARTITIONS,
    }
    if what not in families:
        known = list(families)
        raise ConfigError(f"list: expected one of {', '.join(known)}{nearest(what, known)}")
    import_plugins(plugin or [])
    registry = families[what]
    table = Table(box=None, padding=(0, 2), show_header=False)
    for name in registry.names():
        options = ", ".join(
            f"{key}={'…' if p.default is p.empty else p.default}"
            for key, p in registry.options(name).items()
        )
        table.add_row(f"[bold]{name}[/]", registry.summary(name), f"[dim]{options}[/]")
    if what == "models":
        table.add_row("[bold]torchvision/<name>[/]", "Any torchvision classification model.", "")
    screen().print(table)


@app.command()
def report(path: RunPath, trust: TeacherWeights = False) -> None:
    """Write the HTML report of a run, study, comparison or ablation again; print its table."""
    from fedkd.reporting.run_page import write_report
    from fedkd.runs.directory import RunDirectory
    from fedkd.studies.central.folder import StudyFolder
    from fedkd.studies.engine import kind_of
    from simulations.cli.study import report_again
    from simulations.cli.tables import run_tables

    if (command := kind_of(path)) is not None:
        report_again(path, command, trust=trust)
        return
    if StudyFolder.is_one(path):
        _report_study(path, trust)
        return
    directory = RunDirectory.open(path, trust=trust)
    written = write_report(directory)
    console = screen()
    if directory.read_json("summary.json") is not None:
        console.print(run_tables(directory))
    console.print(f"report  {written}", soft_wrap=True, highlight=False, markup=False)


def _report_study(path: Path, trust: bool) -> None:
    from fedkd.studies.central.folder import StudyFolder
    from fedkd.studies.central.report import methods_table, write_report
    from fedkd.studies.central.results import results
    from simulations.cli.tables import console_table

    folder = StudyFolder.open(path, trust=trust)
    written = write_report(folder)
    console = screen()
    console.print(console_table(methods_table(results(folder))))
    console.print(f"report  {written}", soft_wrap=True, highlight=False, markup=False)


def _student(path: Path, trust: bool) -> Any:
    """The run at `path`, or a student of a study."""
    from fedkd.runs.directory import RunDirectory
    from fedkd.studies.central.folder import ROLES, StudyFolder
    from fedkd.studies.central.training import load_trained

    if StudyFolder.is_one(path) or any((path / f"{role}.pt").is_file() for role in ROLES):
        return load_trained(path, trust=trust)
    return RunDirectory.open(path, trust=trust)


@app.command()
def predict(
    path: StudentPath,
    images: Annotated[list[Path], typer.Argument(help="picture files, or folders of pictures")],
    top: Annotated[int, typer.Option(help="classes shown per picture")] = 3,
    trust: TeacherWeights = False,
) -> None:
    """Name what is in pictures with a run's student; its folder is all that is needed."""
    from rich.text import Text

    from fedkd.runs.export import predict_files

    problems: list[str] = []
    answered = predict_files(_student(path, trust), images, top=top, on_error=problems.append)
    rows: list[tuple[str, list[str]]] = []
    try:
        for file, answers in answered:
            rows.append((str(file), [f"{name} {100 * p:.1f} %" for name, p in answers]))
    finally:  # whatever ends the work, what is known by then is shown
        if rows:
            table = Table(box=None, padding=(0, 2))
            table.add_column("picture", overflow="fold")
            for place in range(1, len(rows[0][1]) + 1):
                table.add_column(f"{place}.", justify="right", overflow="fold")
            for name, cells in rows:
                table.add_row(Text(name), *map(Text, cells))
            console = screen()
            # Into a file or a pipe a row is a line, however long its name.
            (console if console.is_terminal else screen(width=10_000)).print(table)
    for problem in problems:
        print(f"fedkd: {problem}", file=sys.stderr)
    if problems:
        sys.exit(2)


@app.command()
def export(
    path: StudentPath,
    format: Annotated[str, typer.Option(help="torch (torch.export program) or onnx")] = "torch",
    output: Annotated[Path | None, typer.Option(help="file to write")] = None,
    trust: TeacherWeights = False,
) -> None:
    """Write the student to one file and check it against the student."""
    from fedkd.runs.export import export_student

    done = export_student(_student(path, trust), format, output)
    kind = "test images" if done.missing is None else "images of noise"
    console = screen(soft_wrap=True, highlight=False, markup=False)
    console.print(
        f"{done.path}: {done.size:,} bytes; {done.images} {kind} through both: "
        f"largest logit difference {done.difference:.2g}, same class on {done.agreement:.1%}"
    )
    if done.missing is not None:
        console.print(f"not checked on test images: {done.missing}")


def _version(value: bool) -> None:
    if value:
        print(f"fedkd {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    """Distil many private teachers into one small student."""


def main() -> None:
    """Entry point: whatever goes wrong is one line and an exit code, never a traceback."""
    _for_any_terminal()
    if logging.lastResort is not None:  # where warnings of the library are shown
        logging.lastResort.setFormatter(PlainFormatter())
    words = sys.argv[1:]
    _place_working_directory(words)
    try:
        code = run_app(typer.main.get_command(app), words)
        sys.stdout.flush()
    except click.ClickException as error:
        code = _fail(one_line(explain(error, words)), USER_ERROR)
    except Exception as error:
        failure = failure_of(error)
        code = _fail(failure.text, failure.code)
    except KeyboardInterrupt:
        code = _fail("interrupted", INTERRUPTED)
    except SystemExit as end:
        if not isinstance(end.__context__, BrokenPipeError):  # rich ends with 1 on its own
            raise
        code = OUTPUT_GONE
    _leave(code)


def _fail(text: str, code: int) -> int:
    try:
        if text:
            print(f"fedkd: {text}", file=sys.stderr, flush=True)
    except OSError:  # nobody reads: the code has to do
        pass
    return code


def _for_any_terminal() -> None:
    """A sign that the terminal's encoding lacks becomes a `?`, not an error; nor is `>&-` one."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # opened in this order, they get the numbers that are free: 1 and 2
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115, PTH123
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


# What looks at a folder that may be somebody else's, often from within it.
_LOOKS = frozenset(
    ("audit", "contribution", "export", "predict", "quarantine", "report", "status", "unlearn")
)


def _place_working_directory(words: Sequence[str]) -> None:
    """The working directory is where `plugins:` live; it must not hide any other module.

    Python puts it first for `python -m`. Commands that look at a folder, or go on with it, import
    nothing from there unless they are told to trust it.
    """
    here = str(Path.cwd())
    if sys.path[0] in ("", here) and Path(configs.__file__).parents[1] != Path(here):
        del sys.path[0]
    resumes = any(word.split("=")[0] == "--resume" for word in words)
    if (resumes or not _LOOKS.isdisjoint(words[:1])) and "--trust" not in words:
        return
    # An editable install is found after all folders of the path: ours must come before that one.
    for folder in (str(Path(configs.__file__).parents[1]), here):
        if folder not in sys.path:
            sys.path.append(folder)


def _leave(code: int) -> NoReturn:
    """End the process, also where a thread of Flower's or Ray's would go on for ever."""
    deadline = time.monotonic() + 10
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                logging.shutdown()
                os._exit(code)
    if code == OUTPUT_GONE:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # so that Python's own last flush is silent
    sys.exit(code)


if __name__ == "__main__":
    main()
