"""Tasks: `nox -l` lists them, `nox -s smoke` runs one, `nox` runs what a commit needs.

Each makes an environment of its own, as a fresh clone would; `nox -R` uses it again. On Linux
without a GPU, `UV_TORCH_BACKEND=cpu` saves gigabytes.
"""

from __future__ import annotations

import nox

nox.options.sessions = ["lint", "types", "smoke"]
nox.options.default_venv_backend = "uv|virtualenv"
PYTHONS = ["3.11", "3.12", "3.13"]
SUITE = ("pytest", "-q", "-n", "2", "--dist", "loadfile")


@nox.session
def lint(session: nox.Session) -> None:
    """Style and format."""
    session.install("ruff>=0.12,<0.18")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Types, strictly."""
    session.install("-e", ".[dev]")
    session.run("mypy")


@nox.session
def smoke(session: nox.Session) -> None:
    """Each room once, in a minute."""
    session.install("-e", ".[test]")
    session.run(*SUITE, "-m", "smoke", *session.posargs)


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """The default tests, in minutes, without network."""
    session.install("-e", ".[test]")
    session.run(*SUITE, *session.posargs)


@nox.session
def slow(session: nox.Session) -> None:
    """What takes minutes by itself, or real images (FEDKD_DATA)."""
    session.install("-e", ".[test]")
    session.run("pytest", "-q", "-m", "slow", *session.posargs)


@nox.session(name="lowest-dependencies", python="3.11", venv_backend="uv")
def lowest_dependencies(session: nox.Session) -> None:
    """The default tests with the oldest versions that pyproject.toml allows."""
    session.install("--resolution", "lowest-direct", "-e", ".[test]")
    session.run(*SUITE, *session.posargs)


@nox.session(python="3.11")
def docs(session: nox.Session) -> None:
    """The site, without warnings; after `-- gallery` with today's reports."""
    session.install("-e", ".[docs]")
    if "gallery" in session.posargs:
        session.run("python", "docs/gallery.py")
    session.run("mkdocs", "build", "--strict")
