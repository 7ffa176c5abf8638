#!/usr/bin/env bash
# Install the real Slurm that the tests start, on Debian or Ubuntu, as root. Nothing is started.
set -euo pipefail
export DEBIAN_FRONTEND=noninteractive
apt-get -qq update
apt-get -qq install -y --no-install-recommends \
  slurmctld slurmd slurm-client munge slurm-wlm-basic-plugins slurmdbd mariadb-server
