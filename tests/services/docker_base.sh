#!/usr/bin/env bash
# Make a base image without a registry: Debian 12 from its mirror, with this machine's certificates,
# as localhost/base. For tests only; never publish it.
#
#   DOCKER_HOST=… docker_base.sh DIR        DIR keeps the file system's archive for the next time
set -euo pipefail

dir=${1:?usage: docker_base.sh DIR}
mkdir -p "$dir"
if [ ! -s "$dir/base.tar" ]; then
  # shellcheck disable=SC2016  # mmdebstrap gives the hook its $1
  mmdebstrap --quiet --variant=minbase --components=main --include=ca-certificates \
    --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
    --dpkgopt='path-exclude=/usr/share/locale/*' \
    --customize-hook='cp /etc/ssl/certs/ca-certificates.crt "$1/etc/ssl/certs/ca-certificates.crt"' \
    bookworm "$dir/base.part.tar"
  mv "$dir/base.part.tar" "$dir/base.tar"
fi
# pip has certificates of its own unless told.
docker import -c 'ENV PIP_CERT=/etc/ssl/certs/ca-certificates.crt' -c 'CMD ["bash"]' \
  "$dir/base.tar" localhost/base:latest
