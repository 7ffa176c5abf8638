#!/usr/bin/env bash
# Start a real Ceph with its S3 gateway on this machine, as root: ceph_up.sh FOLDER [PORT]
# One monitor, one OSD that keeps everything in memory (up to 8 GiB), one gateway on 127.0.0.1:PORT.
# Access key `test`, secret key `testsecret`. ceph_down.sh FOLDER stops it.
set -euo pipefail
folder=${1:?a folder for its state}
port=${2:-7480}
monitor=$((port + 1))
mkdir -p "$folder"/{mon,osd,rgw,run,log}
host=$(hostname -s)
cluster=$(cat /proc/sys/kernel/random/uuid)
cat > "$folder/ceph.conf" <<CONF
[global]
fsid = $cluster
mon host = v1:127.0.0.1:$monitor
mon initial members = a
auth cluster required = none
auth service required = none
auth client required = none
auth_supported = none
public addr = 127.0.0.1
cluster addr = 127.0.0.1
ms bind msgr2 = false
osd pool default size = 1
osd pool default min size = 1
osd crush chooseleaf type = 0
osd pool default pg num = 8
osd pool default pgp num = 8
mon allow pool size one = true
mon max pg per osd = 1000
mon data avail crit = 1
mon data avail warn = 2
run dir = $folder/run
pid file = $folder/run/\$name.pid
log file = $folder/log/\$name.log
admin socket = $folder/run/\$name.\$pid.asok
[mon.a]
host = $host
mon data = $folder/mon
mon addr = 127.0.0.1:$monitor
[osd.0]
osd objectstore = memstore
memstore device bytes = 8589934592
osd data = $folder/osd
osd op threads = 2
osd class update on start = false
osd crush update on start = false
[client.rgw.a]
rgw frontends = beast endpoint=127.0.0.1:$port
rgw data = $folder/rgw
rgw enable usage log = false
rgw enable ops log = false
rgw run sync thread = false
rgw gc obj min wait = 1
rgw gc processor period = 10
rgw dns name = 127.0.0.1
CONF
export CEPH_CONF="$folder/ceph.conf"
conf=(-c "$CEPH_CONF")
monmaptool --create --clobber --fsid "$cluster" --addv a "[v1:127.0.0.1:$monitor]" \
  "$folder/monmap" > /dev/null
ceph-mon "${conf[@]}" --mkfs -i a --monmap "$folder/monmap" --auth-supported none
ceph-mon "${conf[@]}" -i a --setuser root --setgroup root
# On a busy machine the monitor takes a while to let anybody in.
for _ in $(seq 60); do
  timeout 5 ceph "${conf[@]}" mon stat > /dev/null 2>&1 && break
  sleep 0.5
done
disk=$(cat /proc/sys/kernel/random/uuid)
timeout 30 ceph "${conf[@]}" osd new "$disk" 0 > /dev/null
ceph-osd "${conf[@]}" -i 0 --mkfs --osd-uuid "$disk" > /dev/null 2>&1
timeout 30 ceph "${conf[@]}" osd crush add osd.0 1.0 root=default host="$host" > /dev/null 2>&1
ceph-osd "${conf[@]}" -i 0 --setuser root --setgroup root > /dev/null
for _ in $(seq 150); do
  timeout 5 ceph "${conf[@]}" osd stat 2> /dev/null | grep -q '1 up' && break
  sleep 0.2
done
radosgw "${conf[@]}" -n client.rgw.a --setuser root --setgroup root
for _ in $(seq 300); do
  curl -s -o /dev/null "http://127.0.0.1:$port/" && break
  sleep 0.2
done
radosgw-admin "${conf[@]}" -n client.rgw.a user create --uid=test --display-name=test \
  --access-key=test --secret-key=testsecret > /dev/null
echo "http://127.0.0.1:$port"
