#!/usr/bin/env bash
# Start a private Docker engine on this machine.
#
#   docker_up.sh DIR        then: export DOCKER_HOST=unix://DIR/d.sock
#   docker_down.sh DIR
#
# All state is below DIR. Needs root and the packages of docker_install.sh. The engine has no bridge
# and touches no firewall: containers run with --network host or none.
set -euo pipefail

dir=${1:?usage: docker_up.sh DIR}
for program in dockerd containerd runc docker-init; do
  if ! command -v "$program" >/dev/null; then
    echo "docker_up.sh: $program is missing; run tests/services/docker_install.sh as root" >&2
    exit 69
  fi
done
if [ "$(id -u)" != 0 ]; then
  echo "docker_up.sh: needs root" >&2
  exit 77
fi
if [ -s "$dir/d.pid" ] && kill -0 "$(cat "$dir/d.pid")" 2>/dev/null; then
  echo "docker_up.sh: $dir/d.pid: still running; run docker_down.sh $dir first" >&2
  exit 73
fi
mkdir -p "$dir"/{data,exec,bin}

# An engine that finds this program takes `--gpus`; what it would give to a container is noted.
cat >"$dir/bin/nvidia-container-runtime-hook" <<HOOK
#!/bin/sh
{ echo "\$*"; cat; echo; } >>"$dir/gpu-hook.log"
HOOK
chmod +x "$dir/bin/nvidia-container-runtime-hook"

PATH=$dir/bin:$PATH setsid dockerd --data-root "$dir/data" --exec-root "$dir/exec" \
  --pidfile "$dir/d.pid" --host "unix://$dir/d.sock" \
  --iptables=false --ip6tables=false --bridge=none \
  --exec-opt native.cgroupdriver=cgroupfs --storage-driver "${DOCKER_STORAGE:-overlay2}" \
  </dev/null >"$dir/d.log" 2>&1 &
engine=$!
for _ in $(seq 300); do
  if docker --host "unix://$dir/d.sock" version >/dev/null 2>&1; then
    docker --host "unix://$dir/d.sock" info --format \
      'docker {{.ServerVersion}} {{.Driver}} cgroup v{{.CgroupVersion}}'
    exit 0
  fi
  kill -0 "$engine" 2>/dev/null || break
  sleep 0.1
done
echo "docker_up.sh: the engine did not start:" >&2
tail -n 5 "$dir/d.log" >&2
exit 1
