#!/usr/bin/env bash
# Install the real S3 server that the tests start, on Debian or Ubuntu, as root.
set -euo pipefail
export DEBIAN_FRONTEND=noninteractive
command -v radosgw > /dev/null && command -v ceph-osd > /dev/null && exit 0
apt-get -qq update
apt-get -qq install -y --no-install-recommends radosgw ceph-mon ceph-osd ceph-common
