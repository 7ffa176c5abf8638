#!/usr/bin/env bash
# Stop the engine that docker_up.sh DIR started and its containers, and nothing else. What it stored
# stays in DIR unless --remove is given.
set -uo pipefail

dir=${1:?usage: docker_down.sh DIR [--remove]}
if [ -s "$dir/d.pid" ]; then
  pid=$(cat "$dir/d.pid")
  docker --host "unix://$dir/d.sock" ps --quiet 2>/dev/null |
    xargs -r docker --host "unix://$dir/d.sock" kill >/dev/null 2>&1
  kill "$pid" 2>/dev/null
  for _ in $(seq 200); do
    kill -0 "$pid" 2>/dev/null || break
    sleep 0.1
  done
  if kill -0 "$pid" 2>/dev/null; then
    echo "docker_down.sh: $dir/d.pid: process $pid does not end; killed" >&2
    kill -9 "$pid"
  fi
fi
for place in "$dir"/exec/netns/*; do
  if mountpoint -q "$place"; then umount "$place"; fi
done
if [ "${2:-}" = --remove ]; then rm -rf "$dir"; fi
