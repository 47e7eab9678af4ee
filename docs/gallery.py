"""Reports for the site, made by running what they show: `python docs/gallery.py`, ten minutes.

They lie in `build/gallery`, from where `docs/pages.py` takes those that are there. Nothing is kept
in the repository: a page shows what today's code draws.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MADE = ROOT / "build" / "gallery"


@dataclass(frozen=True)
class Report:
    """One report.

    Attributes:
        title: In the list.
        about: What there is to see, a sentence.
        command: That makes it, without `fedkd`; `RUN` is the folder of the first report.
        page: File in the folder that the command says it wrote.
    """

    title: str
    about: str
    command: str
    page: str = "report.html"


REPORTS = {
    "run": Report(
        "A run",
        "Eight teachers, one student: accuracy, calibration, who agrees with whom, bytes, time.",
        "run configs/quickstart.yaml",
    ),
    "inspect": Report(
        "What the student took over",
        "Where the student looks, what fools it, what else came with the accuracy.",
        "inspect RUN",
        "properties.html",
    ),
    "audit": Report(
        "An audit of a run that promises nothing",
        "Which images were trained on, how sure an attacker is.",
        "audit RUN",
        "audit.html",
    ),
    "contribution": Report(
        "What each client gives",
        "Shares of the accuracy (Shapley values), by class.",
        "contribution RUN",
        "contribution.html",
    ),
    "compare": Report(
        "A comparison",
        "The method beside baselines, with intervals.",
        "compare configs/compare/quickstart.yaml methods=[fedkd,fedavg,feddf,fd,centralised]",
    ),
    "distill": Report(
        "A central study",
        "A student per method, with all losses of the table.",
        "distill configs/distill/digits.yaml seeds=[0]",
    ),
    "attack": Report(
        "Attacks and rules",
        "What each attack costs the student under each fusion rule.",
        "attack configs/attack/quickstart.yaml",
    ),
    "privacy": Report(
        "A privacy sweep",
        "Accuracy for epsilon.",
        "privacy sweep configs/privacy/digits.yaml seeds=[0] epsilons=[inf,5,1]",
    ),
}


def make(names: list[str]) -> None:
    """Run the commands; all of them if none is named."""
    MADE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        runs: dict[str, Path] = {}
        for name in dict.fromkeys(["run", *(names or REPORTS)]):
            report = REPORTS[name]
            words = report.command.replace("configs/", f"{ROOT}/configs/").split()
            words = [str(runs["run"]) if word == "RUN" else word for word in words]
            environment = {**os.environ, "PYTHONPATH": str(ROOT)}
            subprocess.run(
                [sys.executable, "-m", "fedkd", *words], cwd=folder, env=environment, check=True
            )
            found = [runs["run"]] if "RUN" in report.command else Path(folder, "runs").iterdir()
            newest = max(found, key=lambda path: path.stat().st_mtime)
            runs[name] = newest
            shutil.copy(newest / report.page, MADE / f"{name}.html")


if __name__ == "__main__":
    make(sys.argv[1:])
