"""What a deployed federation looks like."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, field
from pathlib import Path

from fedkd.config import ConfigError


def checkout() -> Path:
    """The checkout of fedkd: the one in use, or where one stands.

    What `pip install` copied lacks the `pyproject.toml` that Flower needs to bundle it.

    Raises:
        ConfigError: neither is one.
    """
    for place in (Path(__file__).resolve().parents[2], Path.cwd()):
        if (place / "pyproject.toml").is_file() and (place / "simulations").is_dir():
            return place
    raise ConfigError(
        f"{Path.cwd()} is no checkout of fedkd: start `fedkd deploy init` in one, since the server "
        "bundles it for the nodes"
    )


@dataclass(frozen=True)
class Plan:
    """What a federation looks like.

    Attributes:
        nodes: Number of SuperNodes, which is the number of clients.
        hosts: Names and addresses of the SuperLink; nodes use the first.
        port: Port of the SuperLink.
        own_data: Nodes bring their own images; else each has the whole data set.
        deal: With `own_data`: also give each node its part of the data set, to try things out.
        data: Folder of local data on the nodes; None: to be filled in.
        source: The fedkd checkout that `flwr run` bundles.
        days: How long the certificates are valid.
    """

    nodes: int
    hosts: tuple[str, ...]
    port: int = 8443
    own_data: bool = False
    deal: bool = False
    data: str | None = None
    source: Path = field(default_factory=checkout)
    days: int = 365

    def __post_init__(self) -> None:
        if self.nodes < 1:
            raise ConfigError(f"--nodes: expected at least 1, got {self.nodes}")
        if not self.hosts:
            raise ConfigError("--host: give the name or IP address under which nodes reach it")
        for host in self.hosts:
            if not _is_host(host):
                raise ConfigError(
                    f"--host: expected a DNS name or an IP address without a port, got {host!r}"
                )
        if self.deal and not self.own_data:
            raise ConfigError("--deal goes with --own-data")

    @property
    def address(self) -> str:
        """Where nodes reach the SuperLink."""
        host = self.hosts[0]
        return f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"


def _is_host(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        label = r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
        return bool(re.fullmatch(rf"{label}(\.{label})*", host)) and len(host) < 254
    return True
