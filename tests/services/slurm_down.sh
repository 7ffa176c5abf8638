#!/usr/bin/env bash
# Stop what slurm_up.sh DIR started, and nothing else: by its PID files. State and logs stay.
set -uo pipefail

dir=${1:?usage: slurm_down.sh DIR}
export SLURM_CONF=$dir/etc/slurm.conf

# Stop one daemon and wait for its end, so that its ports are free afterwards.
stop() {
  local pid
  [ -s "$1" ] || return 0
  pid=$(cat "$1")
  kill "$pid" 2>/dev/null || return 0
  for _ in $(seq 600); do
    kill -0 "$pid" 2>/dev/null || return 0
    sleep 0.1
  done
  echo "slurm_down.sh: $1: process $pid does not end; killed" >&2
  kill -9 "$pid"
}

# Jobs would outlive their nodes: a slurmd that stops leaves them alone.
if [ -s "$dir/run/slurmctld.pid" ]; then
  timeout 10 squeue -h -o %A | sort -u | xargs -r timeout 10 scancel --signal=KILL --full 2>/dev/null
  timeout 10 squeue -h -o %A | sort -u | xargs -r timeout 10 scancel 2>/dev/null
  for _ in $(seq 100); do
    [ -n "$(timeout 10 squeue -h 2>/dev/null)" ] || break
    sleep 0.1
  done
fi
# All at once, then wait for one after the other.
for pid_file in "$dir"/run/{slurmd.*,slurmctld}.pid; do
  if [ -s "$pid_file" ]; then kill "$(cat "$pid_file")" 2>/dev/null; fi
done
for pid_file in "$dir"/run/slurmd.*.pid "$dir"/run/{slurmctld,slurmdbd,mysql,munged}.pid; do
  stop "$pid_file"
done
