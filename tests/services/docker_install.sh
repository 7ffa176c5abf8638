#!/usr/bin/env bash
# Install the real Docker engine that the tests start, on Debian or Ubuntu, as root. What the package
# starts itself is left alone: the tests' engine has a folder and a socket of its own.
set -euo pipefail
if [ -x /usr/bin/docker ] && command -v dockerd >/dev/null && command -v mmdebstrap >/dev/null; then exit; fi
export DEBIAN_FRONTEND=noninteractive
apt-get -qq -o DPkg::Lock::Timeout=300 update
apt-get -qq -o DPkg::Lock::Timeout=300 install -y --no-install-recommends \
  docker.io containerd runc tini mmdebstrap
