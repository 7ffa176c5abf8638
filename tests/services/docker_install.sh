#!/usr/bin/env bash
# Install the real Docker engine that the tests start, on Debian or Ubuntu, as root. Nothing is
# started, and no bridge is made.
set -euo pipefail
export DEBIAN_FRONTEND=noninteractive
if command -v dockerd >/dev/null && [ -x /usr/bin/docker ]; then exit; fi
apt-get -qq update
apt-get -qq install -y --no-install-recommends docker.io containerd runc tini
