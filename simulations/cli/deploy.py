"""`fedkd deploy`: keys and scripts for real nodes, and a look at whether a node is ready."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from fedkd.config import ConfigError, Experiment, load_experiment
from fedkd.simulations.cli.arguments import Overrides
from fedkd.simulations.cli.configs import load

app = typer.Typer(help="Run on real machines: TLS, node keys, scripts.", no_args_is_help=True)


@app.command("init")
def init(
    folder: Annotated[Path, typer.Argument(help="a folder that does not exist yet")],
    nodes: Annotated[int, typer.Option(help="number of SuperNodes, one per client")],
    host: Annotated[
        list[str],
        typer.Option(help="name or IP of the SuperLink (may be repeated; nodes use the first)"),
    ],
    config: Annotated[str, typer.Option(help="what to run")] = "configs/quickstart.yaml",
    overrides: Overrides = None,
    port: Annotated[int, typer.Option(help="port of the SuperLink")] = 8443,
    own_data: Annotated[
        bool, typer.Option("--own-data", help="nodes bring their own images")
    ] = False,
    deal: Annotated[
        bool, typer.Option("--deal", help="with --own-data: deal them the data set, to try it out")
    ] = False,
    data: Annotated[str | None, typer.Option(help="folder of local data on the nodes")] = None,
    days: Annotated[int, typer.Option(help="how long certificates are valid", min=1)] = 365,
    listen: Annotated[
        str, typer.Option(help="address the server listens on for nodes (0.0.0.0: open to all)")
    ] = "127.0.0.1",
) -> None:
    """Write certificates, node keys, start scripts and a README, one folder per machine."""
    from fedkd.build import check
    from fedkd.rounds import experiment_context
    from fedkd.simulations.cli.screen import screen
    from fedkd.simulations.deploy.folder import deployable, write_folder
    from fedkd.simulations.deploy.plan import Plan

    plan = Plan(nodes, tuple(host), port, own_data, deal, data, days=days, listen=listen)
    given = load(Experiment, config, overrides or [], "deploy init")
    fixed = [f"clients={nodes}"]
    before = load(Experiment, config, [*(overrides or []), *fixed], "deploy init")
    check(before)
    if given.federation.participation.start is not None:  # others may join with keys of their own
        fixed = []
        if nodes > given.clients:
            raise ConfigError(f"--nodes: {nodes} are more than clients={given.clients}")
    words = [*(overrides or []), *fixed, *deployable(before, plan)]
    experiment = load_experiment(config, words)
    write_folder(folder, plan, experiment, experiment_context(before))
    console = screen()
    console.print(
        f"wrote {folder}: superlink, {nodes} nodes, ca (move ca/ca.key offline)", markup=False
    )
    console.print(f"next: {folder / 'README.md'}", soft_wrap=True, highlight=False, markup=False)


@app.command("policy")
def policy(
    config: Annotated[str, typer.Argument(help="a YAML file, e.g. experiment.yaml of the node")],
    overrides: Overrides = None,
) -> None:
    """Print the strictest policy under which a node takes part in an experiment."""
    from fedkd.rounds import experiment_context
    from fedkd.simulations.deploy.folder import policy_text

    experiment = load_experiment(config, overrides or [])
    print(policy_text(experiment, experiment_context(experiment)), end="")


@app.command("accept")
def accept_(
    node: Annotated[Path, typer.Argument(help="the node's folder, e.g. node-0")],
    checkout: Annotated[Path, typer.Argument(help="the checkout that you have read")],
    keep: Annotated[
        bool, typer.Option("--keep", help="go on accepting what was accepted before")
    ] = False,
) -> None:
    """Let a node run the code of a checkout: no other is unpacked. Then start it again."""
    from fedkd.simulations.deploy.apps import checkout_hash
    from fedkd.simulations.deploy.folder import accept

    app = checkout_hash(checkout.expanduser())
    apps = accept(node.expanduser(), app, keep=keep)
    print(f"accepted {app} ({len(apps)} in all); start supernode.sh again")


@app.command("gate", hidden=True)
def gate(folder: Annotated[Path, typer.Argument(help="the server's folder")]) -> None:
    """Pass on what nodes need to the SuperLink; started by superlink.sh."""
    from fedkd.simulations.deploy.gate import serve

    port, superlink_port = (_port(name) for name in ("PORT", "CONTROL_PORT"))
    serve(folder.resolve(), os.environ.get("LISTEN") or "127.0.0.1", port, superlink_port)


def _port(name: str) -> int:
    value = os.environ.get(name, "")
    if not value.isdecimal() or not 0 < int(value) < 65536:
        raise ConfigError(f"{name} in settings.env: expected a port, got {value!r}")
    return int(value)


@app.command("supernode", hidden=True)
def supernode(folder: Annotated[Path, typer.Argument(help="the node's folder")]) -> None:
    """Be Flower's SuperNode for accepted apps only; started by supernode.sh."""
    from fedkd.simulations.deploy.supernode import run

    run(os.environ, folder.resolve())


@app.command("check")
def check_(
    node: Annotated[Path, typer.Argument(help="the node's folder, e.g. node-0")],
    show: Annotated[
        bool, typer.Option("--print", help="print this machine's fingerprint.json instead")
    ] = False,
) -> None:
    """Look whether a node is ready; exit code 1 if something has to be mended."""
    from fedkd.simulations.cli.screen import screen
    from fedkd.simulations.deploy.check import check_node, node_workspace
    from fedkd.simulations.deploy.fingerprint import fingerprint_of

    folder = node.expanduser().resolve()
    if show:
        print(json.dumps(fingerprint_of(node_workspace(folder)), indent=2))
        return
    console = screen(soft_wrap=True, highlight=False)
    colours = {"ok": "green", "warning": "yellow", "failed": "red"}
    failed = 0
    for finding in check_node(folder):
        failed += finding.state == "failed"
        console.print(f"{finding.state:8}", style=colours[finding.state], end="")
        console.print(f"{finding.what:13}", end="")
        console.print(finding.found, markup=False)
        if finding.mend:
            console.print(f"{'':22}-> {finding.mend}", markup=False)
    if failed:
        print(f"{failed} to mend", file=sys.stderr)
        raise typer.Exit(1)
