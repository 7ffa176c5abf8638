#!/usr/bin/env bash
# Start a private Docker engine: a socket in DIR, no bridge, no firewall rules, nothing of systemd.
#
#   docker_up.sh DIR        then: export DOCKER_HOST=unix://DIR/d.sock
#   docker_down.sh DIR
#
# Needs root and the packages of docker_install.sh. Containers run with --network=host or none.
set -euo pipefail

dir=${1:?usage: docker_up.sh DIR}
if [ -s "$dir/d.pid" ] && kill -0 "$(cat "$dir/d.pid")" 2>/dev/null; then
  echo "docker_up.sh: $dir/d.pid: still running; run docker_down.sh $dir first" >&2
  exit 73
fi
mkdir -p "$dir"/{data,exec}
setsid dockerd --data-root "$dir/data" --exec-root "$dir/exec" --pidfile "$dir/d.pid" \
  --host "unix://$dir/d.sock" --iptables=false --ip6tables=false --bridge=none \
  --exec-opt native.cgroupdriver=cgroupfs </dev/null >"$dir/d.log" 2>&1 &
for _ in $(seq 600); do
  if docker --host "unix://$dir/d.sock" version >/dev/null 2>&1; then exit; fi
  sleep 0.1
done
echo "docker_up.sh: the engine does not answer; see $dir/d.log" >&2
exit 1
