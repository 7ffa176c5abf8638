#!/usr/bin/env bash
# Run a command with a real S3 server at hand: with_ceph.sh COMMAND…
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
folder=$(mktemp -d)
trap 'bash "$here/ceph_down.sh" "$folder"; rm -rf "$folder"' EXIT
endpoint=$(bash "$here/ceph_up.sh" "$folder" "${CEPH_PORT:-7490}" | tail -1)
export BATON_TEST_S3=$endpoint
"$@"
