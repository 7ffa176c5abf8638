#!/usr/bin/env bash
# Stop the engine that docker_up.sh DIR started, with its containers; images stay.
set -uo pipefail

dir=${1:?usage: docker_down.sh DIR}
[ -s "$dir/d.pid" ] || exit 0
pid=$(cat "$dir/d.pid")
export DOCKER_HOST=unix://$dir/d.sock
timeout 30 docker ps --all --quiet | xargs -r timeout 60 docker rm --force >/dev/null
kill "$pid" 2>/dev/null || exit 0
for _ in $(seq 300); do
  kill -0 "$pid" 2>/dev/null || break
  sleep 0.1
done
umount "$dir"/exec/netns/* 2>/dev/null || true
