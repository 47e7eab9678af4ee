#!/bin/sh
# The guide of docs/deploy.md on five "machines": network namespaces with an address each, joined
# by a bridge in the server's. Needs root, `ip`, and fedkd and Flower's commands on PATH.
#
#   tests/simulations/namespaces.sh EMPTY_FOLDER [option or key=value of `fedkd deploy init` ...]
#
# Ends with 0 only if the student is that of the simulation. Run it in the checkout.
set -eu
work=$(realpath -m "$1")
shift
nodes=4
name=fedkd.example.org
lan=192.0.2

machines() { echo server; seq -f 'node%g' 0 $((nodes - 1)); }
on() { where=$1; shift; ip netns exec "fedkd-$where" "$@"; }

cleanup() {
  trap - EXIT INT TERM
  for machine in $(machines); do
    pids=$(ip netns pids "fedkd-$machine" 2>/dev/null || true)
    [ -z "$pids" ] || kill -9 $pids 2>/dev/null || true
    ip netns del "fedkd-$machine" 2>/dev/null || true
    rm -rf "/etc/netns/fedkd-$machine"
  done
}
if [ -e /run/netns/fedkd-server ]; then
  echo "the namespace fedkd-server exists already: is another one running?" >&2
  exit 1
fi
trap cleanup EXIT
trap 'exit 130' INT TERM

for machine in $(machines); do
  ip netns add "fedkd-$machine"
  mkdir -p "/etc/netns/fedkd-$machine"
  # `ip netns exec` shows a namespace this file as /etc/hosts.
  printf '127.0.0.1 localhost\n%s.10 %s\n' "$lan" "$name" > "/etc/netns/fedkd-$machine/hosts"
  on "$machine" ip link set lo up
done
on server ip link add lan type bridge
on server ip addr add "$lan.10/24" dev lan
on server ip link set lan up
for k in $(seq 0 $((nodes - 1))); do
  ip link add eth0 netns "fedkd-node$k" type veth peer name "to$k" netns fedkd-server
  on server ip link set "to$k" master lan up
  on "node$k" ip addr add "$lan.$((20 + k))/24" dev eth0
  on "node$k" ip link set eth0 up
done

fedkd deploy init "$work/federation" --nodes "$nodes" --host "$name" --host "$lan.10" --listen 0.0.0.0 "$@"
began=$(date +%s)
cd "$work/federation"
on server superlink/superlink.sh > superlink.log 2>&1 &
reached() { on "$1" python3 -c "import socket; socket.create_connection(('$2', $3), 2)" 2>/dev/null; }
until reached node0 "$name" 8443 && reached server 127.0.0.1 8444; do sleep 1; done
if reached node0 "$name" 8444; then echo "the SuperLink itself is open to nodes" >&2; exit 1; fi
on server superlink/register.sh > register.log 2>&1
for k in $(seq 0 $((nodes - 1))); do
  on "node$k" fedkd deploy check "node-$k"
  on "node$k" "node-$k/supernode.sh" > "node-$k.log" 2>&1 &
done
echo "ready after $(($(date +%s) - began)) s"
began=$(date +%s)
on server superlink/run.sh > run.log 2>&1 || { tail -n 30 run.log; exit 1; }
echo "run of $(($(date +%s) - began)) s"
run=$(echo superlink/runs/*)
fedkd status "$run"

fedkd run superlink/experiment.yaml --runner local "output=$work/simulation" > simulation.log 2>&1
python3 - "$run" "$work"/simulation/* <<'PY'
import json, sys
from pathlib import Path
deployed, simulated = (json.loads(Path(p, "summary.json").read_text())["hash"] for p in sys.argv[1:])
print("deployed ", deployed)
print("simulated", simulated)
sys.exit(deployed != simulated)
PY
