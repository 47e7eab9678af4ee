"""Where the `fedkd` command begins."""

from __future__ import annotations

import sys

from fedkd.io.extras import MissingExtra, extra


def main() -> None:
    """The `fedkd` command, or a line that names what it needs."""
    try:
        with extra("simulation", "the fedkd command"):
            from fedkd.simulations.cli.main import main as start
    except MissingExtra as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:  # importing takes a second or more
        print("fedkd: interrupted", file=sys.stderr)
        sys.exit(130)  # as of `fedkd.simulations.failures`, which may be what was not imported yet
    start()
