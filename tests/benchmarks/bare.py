"""A machine that has torch, torchvision, numpy and nothing else of fedkd's requirements."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
ABSENT = (
    "annotated_types", "click", "cryptography", "datasets", "flwr", "flwr_datasets", "jinja2",
    "markupsafe", "matplotlib", "onnx", "opacus", "pydantic", "pydantic_core", "ray", "rich",
    "scipy", "sklearn", "typer", "yaml",
)  # fmt: skip
_BARE = f"""
import runpy, sys
from importlib.machinery import PathFinder

class Bare(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        absent = name.split(".")[0] in {ABSENT!r}
        return None if absent else PathFinder.find_spec(name, path, target)

sys.meta_path = [Bare if finder is PathFinder else finder for finder in sys.meta_path]
sys.argv = sys.argv[1:]
sys.path[0] = ""
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def bare(script: str, *words: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a script of `benchmarks/` there."""
    return subprocess.run(
        [sys.executable, "-c", _BARE, str(ROOT / "benchmarks" / script), *map(str, words)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=290,
    )
