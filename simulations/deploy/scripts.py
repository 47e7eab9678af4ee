"""The texts of a deployment folder: scripts, settings, service units, compose file, README."""

from __future__ import annotations

import inspect
import shlex

from fedkd.simulations.deploy.plan import Plan
from fedkd.simulations.deploy.quoting import quoted

_START = """\
#!/bin/sh
# {title}
set -eu
cd "$(dirname "$0")"
set -a
. ./settings.env
PATH="${{FEDKD_BIN:+$FEDKD_BIN:}}$PATH"
# Send nothing, install nothing.
FLWR_TELEMETRY_ENABLED=0
FLWR_DISABLE_UPDATE_CHECK=1
FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1
FLWR_SUPEREXEC_TASK_POLL_INTERVAL=0.2
HF_HUB_OFFLINE=1
HF_DATASETS_OFFLINE=1
FLWR_HOME="$PWD/state/{home}"
umask 077
mkdir -p "$FLWR_HOME"
"""

# One implementation of quoting, here and in Python.
_QUOTED = inspect.getsource(quoted)
assert "'" not in _QUOTED

SUPERLINK = (
    _START.format(
        title="The SuperLink, and the gate that nodes come in by: ./superlink.sh [LISTEN]",
        home="server",
    )
    + """\
LISTEN="${1:-$LISTEN}"
FEDKD_DATA="${DATA_ROOT:-$PWD}"
set +a
# Flower's SuperLink obeys whoever reaches it (who starts runs, who registers keys), so it stays on
# the loopback; the gate listens on LISTEN and passes on what nodes need, nothing else.
fedkd deploy gate . &
exec flower-superlink --host 127.0.0.1 --port "$CONTROL_PORT" \\
  --ssl-ca-certfile ca.crt --ssl-certfile server.crt --ssl-keyfile server.key \\
  --enable-supernode-auth --database state/superlink.db \\
  --disable-runtime-dependency-installation
"""
)

FLWR = (
    _START.format(title="Flower's command line for this SuperLink (called `remote`).", home="cli")
    + """\
set +a
python3 -c '
import sys
"""
    + _QUOTED
    + """
address, ca = map(quoted, sys.argv[1:])
print("[superlink]\\ndefault = \\"remote\\"\\n[superlink.remote]")
print(f"address = {address}\\nroot-certificates = {ca}")
' "127.0.0.1:$CONTROL_PORT" "$PWD/ca.crt" > "$FLWR_HOME/config.$$"
mv "$FLWR_HOME/config.$$" "$FLWR_HOME/config.toml"
exec flwr "$@"
"""
)  # fmt: skip

REGISTER = """\
#!/bin/sh
# Let the nodes in whose public keys lie in nodes/.
set -eu
cd "$(dirname "$0")"
for key in nodes/*.pub; do
  name=$(basename "$key" .pub)
  if ! output=$(COLUMNS=200 ./flwr.sh supernode register "$key" remote --name "$name" 2>&1); then
    case "$output" in
      *"already in use"*) output="$name is registered already" ;;
      *) echo "$output" >&2; exit 1 ;;
    esac
  fi
  echo "$output"
done
./flwr.sh supernode list remote
"""

RUN = (
    """\
#!/bin/sh
# Start a run and follow it: ./run.sh [key=value ...], or ./run.sh --resume runs/NAME [--trust]
# Exit code 0 only if the run was completed (`flwr run --stream` exits with 0 in any case).
set -eu
resume=
if [ "${1:-}" = --resume ]; then resume=$(realpath "$2"); fi
cd "$(dirname "$0")"
given="${FEDKD_SOURCE:-}"
. ./settings.env
FEDKD_SOURCE="${given:-$FEDKD_SOURCE}"
PATH="${FEDKD_BIN:+$FEDKD_BIN:}$PATH"
if [ ! -f "$FEDKD_SOURCE/pyproject.toml" ]; then
  echo "FEDKD_SOURCE in settings.env: expected a checkout of fedkd, got '$FEDKD_SOURCE'" >&2
  exit 2
fi
settings=$(python3 -c '
import shlex, sys
"""
    + _QUOTED
    + """
resume, here, *words = sys.argv[1:]
facts = dict(config=here + "/experiment.yaml", output=here + "/runs", overrides=shlex.join(words))
if resume:
    facts = dict(resume=resume)
facts["keys"] = here + "/nodes"
print(" ".join(f"{name}={quoted(value)}" for name, value in facts.items()))
' "$resume" "$PWD" "$@")
if [ -n "$resume" ] && [ "${3:-}" = --trust ]; then settings="$settings trust=true"; fi
id=$(./flwr.sh run "$FEDKD_SOURCE" remote --format json --run-config "$settings" | python3 -c \\
  'import json, sys; text = sys.stdin.read(); print(json.loads(text[text.index("{"):])["run-id"])')
echo "run id $id; Ctrl-C ends the log, not the run (./flwr.sh stop $id remote)"
while :; do
  ./flwr.sh log "$id" remote || true  # the stream breaks with the SuperLink, the run may go on
  status=$(./flwr.sh ls remote --format json | python3 -c '
import json, sys
runs = json.load(sys.stdin)["runs"]
print(next(run["status"] for run in runs if str(run["run-id"]) == sys.argv[1]))' "$id" || true)
  case "$status" in finished:*) break ;; esac
  sleep 2
done
echo "$status"
[ "$status" = finished:completed ]
"""
)

SUPERNODE = (
    _START.format(title="One SuperNode: trains on its own images, says what its teacher thinks.",
                  home="node")
    + """\
set +a
child=
trap 'trap - TERM INT; [ -z "$child" ] || kill "$child"; wait; exit 0' TERM INT
while :; do
  fedkd deploy supernode . &
  child=$!
  code=0
  wait "$child" || code=$?
  case $code in 0|2) exit $code ;; esac  # ended by its owner; or a setting has to be mended
  # Not registered yet; or it was killed, and the SuperLink takes it for alive until it has
  # missed the heartbeat (up to a minute) and lets nobody in with the same key.
  echo "the SuperNode ended; once more in 5 seconds" >&2
  sleep 5 &
  wait $!
done
"""
)  # fmt: skip


def server_settings(plan: Plan) -> str:
    """settings.env of the SuperLink."""
    data = "; empty: here, where public.npz is." if plan.own_data else ", as FEDKD_DATA."
    return f"""\
# Where nodes reach the SuperLink: a name or address in its certificate.
{_line("SUPERLINK", plan.address)}
# Where the gate listens for nodes. 127.0.0.1: nobody outside reaches it. 0.0.0.0: open to nodes.
{_line("LISTEN", plan.listen)}
{_line("PORT", plan.port)}
# Where the SuperLink itself listens, on the loopback of this machine only.
{_line("CONTROL_PORT", plan.control_port)}
# The fedkd checkout that `flwr run` bundles.
{_line("FEDKD_SOURCE", plan.source)}
# Folder of local data{data}
{_line("DATA_ROOT", "" if plan.own_data else plan.data or "")}
# Folder of the installed commands (venv/bin), if they are not on PATH.
FEDKD_BIN=''
"""


def _line(name: str, value: object) -> str:
    """A setting that means the same to the shell, whatever characters it holds."""
    return f"{name}={shlex.quote(str(value))}"


def node_settings(plan: Plan, number: int, app: str) -> str:
    """settings.env of a SuperNode; relative paths start from its folder."""
    if plan.own_data:
        data = f"""\
# This node's own images: an .npz file with uint8 images x and labels y, or a folder of pictures
# with one subfolder per class. They stay here.
{_line("DATA", "private.npz" if plan.deal else "")}
# Folder of public.npz.
DATA_ROOT=.
"""
    else:
        data = f"""\
# Empty: the experiment deals the data set, and this node takes its part of it.
DATA=''
# Folder of local data; digits and synthetic need none.
{_line("DATA_ROOT", plan.data or "")}
"""
    return f"""\
# Where the SuperLink is; this name or address has to be one in its certificate.
{_line("SUPERLINK", plan.address)}
# Which client this is, counted from 0, and how many there are. Its key proves it to the server.
PARTITION_ID={number}
NUM_PARTITIONS={plan.nodes}
KEY=node.key
# The code this node runs, by hash; the server sends it and no other is unpacked. To accept other
# code that you have read: fedkd deploy accept . CHECKOUT
{_line("APPS", app)}
# What this node allows, whatever the server asks for; read it, it is yours to change.
POLICY=policy.yaml
{data}\
# Where teachers are kept between messages and over restarts. Private.
STATE=state
# A port of this machine's loopback; another one for each node on the same machine.
RUNTIME_PORT={9100 + number}
# Folder of the installed commands (venv/bin), if they are not on PATH.
FEDKD_BIN=''
"""


PEERS_SETTING = """\
# Public keys of all nodes, node-0.pub and so on: votes are summed with their holders alone. They
# have to come from whoever made them, by another way than through the server.
PEERS=peers
"""


def unit(what: str, script: str) -> str:
    """A systemd unit; FOLDER is to be replaced by where the folder lies."""
    return f"""\
# Replace FOLDER by this folder's place, then copy to /etc/systemd/system:
#   sed "s|FOLDER|$PWD|" THIS.service | sudo tee /etc/systemd/system/THIS.service
[Unit]
Description=fedkd {what}
Wants=network-online.target
After=network-online.target

[Service]
User=fedkd
WorkingDirectory=FOLDER
ExecStart="FOLDER/{script}"
Restart=on-failure
RestartSec=5
NoNewPrivileges=yes
PrivateTmp=yes
ProtectSystem=full

[Install]
WantedBy=multi-user.target
"""


def compose(plan: Plan) -> str:
    """A compose file with all machines of the federation on one host."""
    host = plan.hosts[0]
    services = [
        f"""\
  superlink:
    <<: *machine
    command: ["/deploy/superlink.sh", "0.0.0.0"]
    environment: {{FEDKD_SOURCE: /src}}
    volumes: ["./superlink:/deploy"]
    ports: ["{plan.port}:{plan.port}"]
    networks: {{default: {{aliases: ["{host}"]}}}}
"""
    ]
    for number in range(plan.nodes):
        services.append(
            f"""\
  node-{number}:
    <<: *machine
    command: ["/deploy/supernode.sh"]
    volumes: ["./node-{number}:/deploy"]
    depends_on: [superlink]
"""
        )
    return f"""\
# FEDKD_SOURCE=/path/of/the/checkout docker compose up --build
# then: docker compose exec superlink /deploy/register.sh
# Nodes reach the SuperLink as {host}: a DNS name becomes its alias in here; an IP address has to
# be one of the host's own (not 127.0.0.1). Folders of data on the host have to be mounted too.
name: fedkd

x-machine: &machine
  image: fedkd
  build:
    context: ${{FEDKD_SOURCE:?set it to the fedkd checkout}}
    dockerfile_inline: |
      FROM python:3.11-slim
      COPY . /src
      RUN pip install --no-cache-dir '/src[all]'
  init: true
  restart: on-failure

services:
{"".join(services)}"""


def readme(plan: Plan, name: str, address: str) -> str:
    """The commands, in the order of their use."""
    data = (
        "Give each node its own images: set `DATA` in its `settings.env`."
        if plan.own_data and not plan.deal
        else "Look into `settings.env` of each node: `DATA_ROOT` is its folder of data."
        if not plan.own_data
        else "Each node folder holds its part of the data set (`private.npz`), to try things out."
    )
    return f"""\
# Federation of `{name}`: {plan.nodes} nodes, SuperLink at {address}

`ca/ca.key` signs certificates and is needed by no machine: move it offline. Every `.key` file is a
secret. The certificate is valid for {plan.days} days and for: {", ".join(plan.hosts)}.

1. Install the same fedkd on every machine: `pip install '/path/of/the/checkout[all]'`.
2. Copy `superlink/` to the server and `node-K/` to node K, over a secure channel (`scp -pr`).
   {data}
3. On the server: set `LISTEN=0.0.0.0` in `settings.env` to let nodes in, then `./superlink.sh`, and
   in another shell `./register.sh`.
4. On each node: `fedkd deploy check .`, then `./supernode.sh`.
5. On the server: `./run.sh`, with `key=value` words to override `experiment.yaml`.
   Meanwhile, and afterwards: `fedkd status runs/NAME`.
6. After a crash of the server: `./superlink.sh` again, then `./run.sh --resume runs/NAME`.

As services: `fedkd-*.service`. In containers on one host: `compose.yaml`.
A node that should stay out: `./flwr.sh supernode list remote`, then
`./flwr.sh supernode unregister NODE_ID remote`.
"""
