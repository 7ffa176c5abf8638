#!/usr/bin/env bash
# Start a private Slurm on this machine: real daemons, virtual nodes, fake GPUs, accounting.
#
#   slurm_up.sh DIR         then: export SLURM_CONF=DIR/etc/slurm.conf
#   slurm_down.sh DIR
#
# All state is below DIR, every port is on 127.0.0.1. Needs root (nodes start other users' jobs,
# GPU device files are made with mknod) and the packages of slurm_install.sh. Settings:
#   SLURM_BASE_PORT=17000        first of about 20 ports
#   SLURM_NODES=3                virtual nodes n1, n2, … of 4 cores and 3 GPUs
#   SLURM_REQUEUE_EXIT=75        RequeueExit; empty: a site that does not set it
#   SLURM_USER_SIGNAL=yes        preempt_send_user_signal; no: preemption is TERM alone
set -euo pipefail

dir=${1:?usage: slurm_up.sh DIR}
base=${SLURM_BASE_PORT:-17000}
nodes=${SLURM_NODES:-3}
requeue_exit=${SLURM_REQUEUE_EXIT-75}
user_signal=${SLURM_USER_SIGNAL:-yes}
host=$(hostname -s)

for program in munged slurmctld slurmd slurmdbd mariadbd mariadb-install-db; do
  if ! command -v "$program" >/dev/null; then
    echo "slurm_up.sh: $program is missing; run tests/services/slurm_install.sh as root" >&2
    exit 69
  fi
done
if [ "$(id -u)" != 0 ]; then
  echo "slurm_up.sh: needs root" >&2
  exit 77
fi
for pid_file in "$dir"/run/*.pid; do
  if [ -s "$pid_file" ] && kill -0 "$(cat "$pid_file")" 2>/dev/null; then
    echo "slurm_up.sh: $pid_file: still running; run slurm_down.sh $dir first" >&2
    exit 73
  fi
done

# Try a command ten times a second until it succeeds.
patiently() {
  local seconds=$1
  shift
  for _ in $(seq $((seconds * 10))); do
    if "$@" >/dev/null 2>&1; then return; fi
    sleep 0.1
  done
  echo "slurm_up.sh: not ready after $seconds s: $*; see $dir/log" >&2
  return 1
}

mkdir -p "$dir"/{etc,run,log,state,spool,dev,tmp}
# The signature check of munge is useless below a folder that others may write to.
chmod 755 "$dir" "$dir"/*

# --- munge: a key and a socket of our own ---------------------------------------------------
if [ ! -s "$dir/etc/munge.key" ]; then
  (umask 077 && head -c 128 /dev/urandom >"$dir/etc/munge.key")
fi
munged --force --key-file="$dir/etc/munge.key" --socket="$dir/run/munge.sock" \
  --pid-file="$dir/run/munged.pid" --log-file="$dir/log/munged.log" \
  --seed-file="$dir/run/munged.seed" --num-threads=4

# --- configuration --------------------------------------------------------------------------
# slurmd takes only character devices for GPUs; these are /dev/null under other names.
for gpu in 0 1 2; do
  [ -c "$dir/dev/gpu$gpu" ] || mknod "$dir/dev/gpu$gpu" c 1 3
done
echo "Name=gpu Type=fake File=$dir/dev/gpu[0-2]" >"$dir/etc/gres.conf"

{
  # A credential's life delays the second start of a requeued job: 8 s here, 121 s by default.
  # Time-outs are for a busy machine: none of them is waited for when all goes well, except
  # SlurmdTimeout by who takes a node away. Accounts are enforced, as on most clusters.
  cat <<CONF
ClusterName=baton
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$base
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=socket=$dir/run/munge.sock,cred_expire=7
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
SlurmctldPidFile=$dir/run/slurmctld.pid
SlurmdPidFile=$dir/run/slurmd.%n.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd.%n.log
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmdParameters=config_overrides
SwitchType=switch/none
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=5
PropagateResourceLimits=NONE
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=20
KillWait=60
UnkillableStepTimeout=120
BatchStartTimeout=120
MessageTimeout=60
TCPTimeout=20
MinJobAge=600
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,bf_resolution=1,sched_interval=2,batch_sched_delay=0,sched_min_interval=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
GresTypes=gpu
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=$((base + 9))
AccountingStoragePass=$dir/run/munge.sock
AccountingStorageTRES=gres/gpu
AccountingStorageEnforce=associations,limits
CONF
  if [ -n "$requeue_exit" ]; then echo "RequeueExit=$requeue_exit"; fi
  if [ "$user_signal" = yes ]; then echo "SlurmctldParameters=preempt_send_user_signal"; fi
  for i in $(seq "$nodes"); do
    echo "NodeName=n$i NodeHostname=$host NodeAddr=127.0.0.1 Port=$((base + 10 + i)) CPUs=4 Boards=1" \
      "SocketsPerBoard=1 CoresPerSocket=4 ThreadsPerCore=1 RealMemory=8000 Gres=gpu:fake:3"
  done
  # low is taken over by high; in lowgrace a job is warned before, in lowcancel it is not requeued.
  cat <<CONF
PartitionName=main Nodes=ALL Default=YES MaxTime=1:00:00 DefMemPerCPU=500 PriorityTier=5 PreemptMode=OFF
PartitionName=low Nodes=ALL MaxTime=1:00:00 DefMemPerCPU=500 PriorityTier=1 PreemptMode=REQUEUE
PartitionName=lowgrace Nodes=ALL MaxTime=1:00:00 DefMemPerCPU=500 PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=lowcancel Nodes=ALL MaxTime=1:00:00 DefMemPerCPU=500 PriorityTier=1 PreemptMode=CANCEL GraceTime=60
PartitionName=high Nodes=ALL MaxTime=1:00:00 DefMemPerCPU=500 PriorityTier=10 PreemptMode=OFF
CONF
} >"$dir/etc/slurm.conf"
export SLURM_CONF=$dir/etc/slurm.conf

# --- accounting: a private database on a socket, then slurmdbd ------------------------------
# Two databases that are made at the same moment would share names in /tmp.
export TMPDIR=$dir/tmp
if [ ! -d "$dir/mysql" ]; then
  mkdir "$dir/mysql"
  mariadb-install-db --no-defaults --user=root --datadir="$dir/mysql" \
    --auth-root-authentication-method=normal --skip-test-db >"$dir/log/mysql-install.log" 2>&1
fi
mariadbd --no-defaults --user=root --datadir="$dir/mysql" --socket="$dir/run/mysql.sock" \
  --bind-address=127.0.0.1 --port=$((base + 8)) --pid-file="$dir/run/mysql.pid" \
  --innodb-buffer-pool-size=64M --innodb-lock-wait-timeout=900 \
  --innodb-flush-log-at-trx-commit=0 </dev/null >"$dir/log/mysql.log" 2>&1 &
mysql=(mariadb --no-defaults --user=root --socket="$dir/run/mysql.sock")
patiently 120 "${mysql[@]}" -e 'select 1'
"${mysql[@]}" -e "create database if not exists slurm_acct_db;
  create user if not exists 'slurm'@'127.0.0.1' identified by 'slurm';
  grant all on slurm_acct_db.* to 'slurm'@'127.0.0.1'"

(umask 077 && cat >"$dir/etc/slurmdbd.conf") <<CONF
AuthType=auth/munge
AuthInfo=socket=$dir/run/munge.sock,cred_expire=5
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort=$((base + 9))
SlurmUser=root
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=$((base + 8))
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_acct_db
LogFile=$dir/log/slurmdbd.log
PidFile=$dir/run/slurmdbd.pid
CommunicationParameters=NoInAddrAny
CONF
unset TMPDIR
slurmdbd
patiently 120 timeout 5 sacctmgr -n show cluster
# In account `small`, nobody may have more than one job.
for words in "cluster baton" "account test cluster=baton" "user root account=test" \
  "account small cluster=baton MaxSubmitJobs=1" "user root account=small cluster=baton"; do
  # shellcheck disable=SC2086  # words of a command
  sacctmgr -i -Q add $words >/dev/null 2>&1 || true # added by an earlier start
done

# --- the controller and the nodes -----------------------------------------------------------
slurmctld
for i in $(seq "$nodes"); do slurmd -N "n$i"; done
all_idle() { [ "$(sinfo -h -N -p main -o %t | grep -cx idle)" = "$nodes" ]; }
patiently 120 all_idle
sinfo -N -p main -o '%N %t %c cores %m MB %G'
