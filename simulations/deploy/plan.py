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
        listen: Address on which the SuperLink's machine listens for nodes.
    """

    nodes: int
    hosts: tuple[str, ...]
    port: int = 8443
    own_data: bool = False
    deal: bool = False
    data: str | None = None
    source: Path = field(default_factory=checkout)
    days: int = 365
    listen: str = "127.0.0.1"

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
        if not 0 < self.port < 65536:
            raise ConfigError(f"--port: expected 1 to 65535, got {self.port}")
        if not _is_address(self.listen):
            raise ConfigError(f"--listen: expected an IP address, got {self.listen!r}")
        if self.deal and not self.own_data:
            raise ConfigError("--deal goes with --own-data")

    @property
    def control_port(self) -> int:
        """Port of the SuperLink itself, on the loopback."""
        return self.port + 1 if self.port < 65535 else self.port - 1

    @property
    def address(self) -> str:
        """Where nodes reach the SuperLink."""
        host = self.hosts[0]
        return f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _is_host(host: str) -> bool:
    if not _is_address(host):
        label = r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
        return bool(re.fullmatch(rf"{label}(\.{label})*", host)) and len(host) < 254
    return True
