#!/usr/bin/env bash
# Stop what ceph_up.sh started: ceph_down.sh FOLDER
set -euo pipefail
for file in "$1"/run/client.rgw.a.pid "$1"/run/osd.0.pid "$1"/run/mon.a.pid; do
  [ -s "$file" ] || continue
  pid=$(cat "$file")
  kill "$pid" 2> /dev/null || continue
  for _ in $(seq 100); do
    kill -0 "$pid" 2> /dev/null || break
    sleep 0.1
  done
  kill -9 "$pid" 2> /dev/null || true
done
