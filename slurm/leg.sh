#!/usr/bin/env bash
# One leg of one task in a Slurm job: the one owner of signals, container, exit status and requeue.
#
#   leg.sh PLAN_JSON [TASK]     a frozen plan; without TASK, the SLURM_ARRAY_TASK_ID-th of BATON_TASKS
#   leg.sh EXP [--set K=V …]    an experiment; the first leg of the job freezes its plan
#
# It must be the batch script or be `exec`ed by it: `--signal=B:…` signals that one process.
# Settings are exported variables; README.md beside this file lists them.
#
# Everything is in functions: bash reads a script while it runs it, and a leg may last for days.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export BATON_HOME=${BATON_HOME:-$(dirname "$here")}
runtime=${BATON_RUNTIME:-none}
requeue_how=${BATON_REQUEUE:-auto}
grace=${BATON_GRACE_SECONDS:-120}
grace=${grace%.*}
export BATON_GRACE_SECONDS=$grace PYTHONUNBUFFERED=1
arguments=("$@")
if [[ ${BATON_STORE:-/} != /* && $BATON_STORE != *://* ]]; then
  export BATON_STORE=$PWD/$BATON_STORE
fi
# `scontrol requeue` of an array's own number would requeue all of its elements.
job=${SLURM_JOB_ID:?leg.sh runs inside a Slurm job; without Slurm use: baton submit}
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID; fi
# What groups the legs of one submission; kept when a handover goes to a job of another number.
export BATON_SUBMISSION=${BATON_SUBMISSION:-slurm:$job}
task='' asked='' interrupted='' srun_pid=''

note() {
  echo "$(date -u +%Y-%m-%dT%H:%M:%S) leg.sh job=$job restarts=${SLURM_RESTART_COUNT:-0}" \
    "task=${task:--} $*"
}

# --- signals --------------------------------------------------------------------------------

# The user signal comes to this script alone, TERM to every process of the job. srun passes USR2
# on to all tasks; TERM it takes as an order to abort the step. No trap for CONT, which Slurm sends
# together with the others: bash would lose one of the two.
# shellcheck disable=SC2329  # called by the traps
ask_to_stop() {
  asked=$1 interrupted=yes
  note "signal=$1"
  if [ -n "$srun_pid" ]; then kill -s USR2 "$srun_pid" 2>/dev/null || true; fi
}
trap 'ask_to_stop TERM' TERM
trap 'ask_to_stop USR2' USR2
trap 'ask_to_stop USR1' USR1

# Wait for the end of srun through any number of signals; its exit status is in $status.
wait_for_srun() {
  while true; do
    interrupted='' status=0
    wait "$srun_pid" || status=$?
    # A trapped signal ends `wait` with a status of its own while srun lives on.
    if [ -z "$interrupted" ]; then return; fi
  done
}

# --- how a leg ends: each of these is the last thing done -----------------------------------

stop_for_good() {
  note "verdict=stopped reason='$1'" >&2
  exit 78
}

# The work is saved and this job starts nothing more. Not 0, which releases who waits for this
# job; not 75, which a cluster's RequeueExit may requeue. $1 is the status of a leg that failed.
leave() {
  note "verdict=left reason='$2'"
  if [ "$1" = 75 ]; then exit 79; fi
  exit "$1"
}

# A field of Slurm's record of this job; empty where there is none.
field() { scontrol -o show job "$job" 2>/dev/null | tr ' ' '\n' | sed -n "s/^$1=//p" || true; }

was_requeued() {
  local restarts
  restarts=$(field Restarts)
  [ "${restarts:-0}" -gt "${SLURM_RESTART_COUNT:-0}" ]
}

# A job that Slurm is ending shows why, except when somebody cancelled it.
was_cancelled() {
  local preempted
  preempted=$(field PreemptTime)
  [ "$(field JobState)" = COMPLETING ] && [ "${preempted:-None}" = None ] &&
    [[ ! $(field Reason) =~ ^(TimeLimit|NodeDown)$ ]]
}

# Let another leg go on, after one that ended in $1.
start_again() {
  local refused
  if [ "$requeue_how" = never ]; then
    leave "$1" 'requeue is set to never: submit again to go on'
  fi
  if was_requeued; then
    note "verdict=requeued by=slurm"
    exit 75
  fi
  if was_cancelled; then
    # Asked to, Slurm would start even a cancelled job again.
    leave "$1" 'the job was cancelled'
  fi
  if [ "$requeue_how" = auto ] && [ "$(field Requeue)" = 0 ]; then
    # Somebody's --no-requeue, or JobRequeue=0 of a cluster: this job shall not start twice.
    note "this job may not be requeued (--no-requeue)"
  elif [ "$requeue_how" = auto ]; then
    # Said before, because a requeue kills this script at once.
    note "verdict=requeued by=leg.sh"
    for _ in {1..60}; do
      if refused=$(scontrol requeue "$job" 2>&1); then exit 75; fi
      if [[ ! $refused =~ [Cc]ontact|[Tt]imed|[Cc]onnect ]]; then break; fi
      note "the controller does not answer: $refused"
      sleep 5
    done
    # Slurm may have done it between the question and the order.
    if was_requeued; then exit 75; fi
    note "requeue was refused: $refused"
  fi
  resubmit
}

# Submit the same as a job of its own, and let who waits for this job wait for that one.
resubmit() {
  local script=${BATON_SCRIPT:-} copy='' new
  # What the job waited for is over, or it would not have run.
  words=(--parsable --dependency=)
  option array "${SLURM_ARRAY_TASK_ID:-}"
  if [ -z "$script" ]; then
    copy=$(mktemp) script=$copy
    scontrol write batch_script "$SLURM_JOB_ID" "$script" >/dev/null ||
      leave 75 'Slurm does not give its script out, see above: submit again to go on'
    options_of_this_job
    set -- "${arguments[@]}"
  else
    set --
  fi
  new=$(
    # What Slurm says about this job is no wish about the next.
    for name in $(compgen -e | grep '^SLURM_' | grep -vx SLURM_CONF); do unset "$name"; done
    sbatch "${words[@]}" "$script" "$@"
  ) || leave 75 'it could not be submitted again, see above: submit again to go on'
  if [ -n "$copy" ]; then rm -f "$copy"; fi
  new=${new%%;*}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}
  move_dependents "$new"
  note "verdict=resubmitted as=$new"
  exit 79
}

option() {
  case $2 in
    '' | '(null)') ;;
    *) words+=("--$1=$2") ;;
  esac
}

# Options of the command line are in no script; these say where and how a job runs.
options_of_this_job() {
  option job-name "$SLURM_JOB_NAME"
  option partition "$SLURM_JOB_PARTITION"
  option account "${SLURM_JOB_ACCOUNT:-}"
  option qos "${SLURM_JOB_QOS:-}"
  option reservation "${SLURM_JOB_RESERVATION:-}"
  option nodes "$SLURM_JOB_NUM_NODES"
  option ntasks "${SLURM_NTASKS:-}"
  option ntasks-per-node "${SLURM_NTASKS_PER_NODE:-}"
  option cpus-per-task "${SLURM_CPUS_PER_TASK:-}"
  option mem "${SLURM_MEM_PER_NODE:-}"
  option mem-per-cpu "${SLURM_MEM_PER_CPU:-}"
  option mem-per-gpu "${SLURM_MEM_PER_GPU:-}"
  option gpus "${SLURM_GPUS:-}"
  option gpus-per-node "${SLURM_GPUS_PER_NODE:-}"
  option gpus-per-task "${SLURM_GPUS_PER_TASK:-}"
  if [ -z "${SLURM_GPUS_PER_NODE:-}" ]; then
    # `gres:gpu:a100:2`, since 23.02 `gres/gpu:a100:2`.
    option gres "$(field TresPerNode | sed -E 's#(^|,)gres[:/]#\1#g')"
  fi
  option constraint "$(field Features)"
  option nodelist "$(field ReqNodeList)"
  option exclude "$(field ExcNodeList)"
  option time "$(squeue -h -j "$job" -o %l)"
  option signal "B:USR2@$grace"
  option chdir "$PWD"
  option output "$(scontrol show job "$job" | sed -n 's/^ *StdOut=//p')"
  if [ "$(field OverSubscribe)" = NO ]; then words+=(--exclusive); fi
  if [ "$(field Requeue)" = 0 ]; then words+=(--no-requeue); fi
}

# Jobs that wait for this job's success wait for job $1's from now on: this one ends without.
move_dependents() {
  local waiting what array=${SLURM_ARRAY_JOB_ID:-none}
  while read -r waiting what; do
    what=${what//(unfulfilled)/}
    if [[ :${what//,/:}: == *:"$job":* ]]; then
      what=$(sed -E "s/:$job(:|,|\$)/:$1\1/g" <<<"$what")
    elif [[ $what == aftercorr:"$array"_\* && $waiting == *_"${SLURM_ARRAY_TASK_ID:-}" ]]; then
      what=afterok:$1
    elif [[ ,$what, == *,afterany:"$array"_\*,* ]]; then
      what+=,afterany:$1
    else
      continue
    fi
    if scontrol update jobid="$waiting" dependency="$what"; then
      note "job $waiting waits for $what now"
    fi
  done < <(squeue -h -r -t PENDING -u "$(id -un)" -o '%i %E')
}

# Count a failure; false once there were too many in a row. Handovers are not failures.
may_try_again() {
  local of='' count=0
  if [ -s "$failures" ]; then read -r count of <"$failures"; fi
  if [ "$of" != "$BATON_SUBMISSION" ]; then count=0; fi
  echo "$((count + 1)) $BATON_SUBMISSION" >"$failures"
  [ "$count" -lt "${BATON_RETRIES:-2}" ]
}

# --- the runtime: baton in a venv or in a container -----------------------------------------

# `baton` is the command, `step` what srun needs for it, `process` what each process runs first:
# only there its rank is known.
# shellcheck disable=SC2016  # expanded by the process
set_rank='export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID'
process="$set_rank; exec \"\$@\""
passed_on='^(BATON|SLURM|HF|AWS|WANDB|MODELSCOPE|NCCL|GLOO|OMP|TORCH|PYTORCH|CUDA|TOKENIZERS)_'
passed_on+='|^(RANK|WORLD_SIZE|LOCAL_RANK|PYTHONUNBUFFERED)$|^(http|https|no)_proxy$'

# Fill them in for a container that sees the folders named.
choose_runtime() {
  local mounts=() mount name
  for mount in "$@"; do
    if [ -d "$mount" ]; then mounts+=("$mount:$mount"); fi
  done
  mounts+=("$BATON_HOME/jobs:$BATON_HOME/jobs:ro" "$BATON_HOME/launch:$BATON_HOME/launch:ro")
  for mount in ${BATON_MOUNTS:-}; do mounts+=("$mount"); done
  if [ "$runtime" != none ] && [ -z "${BATON_IMAGE:-}" ]; then
    stop_for_good "BATON_RUNTIME=$runtime needs BATON_IMAGE"
  fi
  case $runtime in
    none)
      baton=("${BATON_PYTHON:-python3}" -m baton)
      ;;
    apptainer)
      baton=(apptainer exec)
      if [ -n "${SLURM_GPUS_ON_NODE:-}" ]; then baton+=(--nv); fi
      for mount in "${mounts[@]}"; do baton+=(--bind "$mount"); done
      baton+=("$BATON_IMAGE" baton)
      ;;
    pyxis)
      step=(--container-image="$BATON_IMAGE" --container-mounts="$(IFS=, && echo "${mounts[*]}")")
      baton=(baton)
      ;;
    docker | podman)
      # The client passes signals on, --init gives them to Python. A client that is killed leaves
      # its container at work, so it has a name by which the next leg on this node removes it.
      # shellcheck disable=SC2016  # expanded by the process
      process="$set_rank"'; engine=$1; shift; name=baton-$SLURM_JOB_ID-$SLURM_PROCID
        "$engine" rm --force "$name" >/dev/null 2>&1
        gpus=${SLURM_STEP_GPUS:-${SLURM_JOB_GPUS:-}}
        case $engine in
          docker) [ -z "$gpus" ] || set -- --gpus "\"device=$gpus\"" "$@" ;;
          podman) [ -z "$gpus" ] || set -- --device=nvidia.com/gpu=all "$@" ;;
        esac
        exec "$engine" run --name "$name" "$@"'
      baton=("$runtime" --rm --init --network=host --ipc=host --stop-timeout="$grace")
      if [ "$runtime" = podman ]; then
        baton+=(--userns=keep-id)
      else
        baton+=(--user="$(id -u):$(id -g)")
      fi
      for mount in "${mounts[@]}"; do baton+=(--volume="$mount"); done
      # Names without values: the engine takes those, tokens among them, from its environment.
      while read -r name; do baton+=(--env="$name"); done < <(
        { compgen -e && printf '%s\n' RANK WORLD_SIZE LOCAL_RANK; } | grep -E "$passed_on" | sort -u
      )
      baton+=("$BATON_IMAGE")
      ;;
    *) stop_for_good "BATON_RUNTIME=$runtime: expected none, apptainer, pyxis, docker or podman" ;;
  esac
}

# Print what this node would have to have and has not; false where nothing is missing.
missing_program() {
  local program=${baton[0]}
  if [ "$runtime" = pyxis ]; then return 1; fi
  ! command -v "$program" >/dev/null && echo "$program"
}

# --- what to run ----------------------------------------------------------------------------

# Print the plan of an experiment and its tasks. It is frozen once a job: a later leg must not take
# up what was edited since. The record's first line is what was asked for.
frozen_plan() {
  local store=${BATON_STORE:-$BATON_HOME/runs} record wanted
  record=$store wanted="$* in $store"
  if [[ $store == *://* ]]; then record=$BATON_HOME/runs; fi
  mkdir -p "$record/slurm"
  record+=/slurm/${SLURM_CLUSTER_NAME:-slurm}-${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}.txt
  if [ ! -s "$record" ] || [ "$(head -n 1 "$record")" != "$wanted" ]; then
    choose_runtime "$store"
    {
      echo "$wanted"
      srun --ntasks=1 --nodes=1 --export=ALL --mpi=none --input=none "${step[@]}" \
        sh -c "$process" leg "${baton[@]}" freeze "$@" --store "$store"
    } >"$record.$job" || return
    mv "$record.$job" "$record"
  fi
  tail -n +2 "$record"
}

main() {
  baton=() step=() status=0
  if [ $# = 0 ]; then stop_for_good "usage: leg.sh PLAN_JSON [TASK], or leg.sh EXP"; fi
  # An exported token is kept by Slurm with the job; one in a file that only its owner reads is not.
  if [ -n "${BATON_ENV_FILE:-}" ]; then
    while IFS= read -r line; do
      if [[ $line =~ ^[A-Za-z_][A-Za-z_0-9]*= ]]; then export "${line?}"; fi
    done <"$BATON_ENV_FILE"
  fi
  if [[ $1 == *.json ]]; then
    plan=$1 task=${2:-}
    read -ra tasks <<<"${BATON_TASKS:-}"
  else
    frozen=$(frozen_plan "$@") || status=$?
    if [ -n "$asked" ]; then start_again 75; fi
    if [ "$status" != 0 ]; then
      note "verdict=failed status=$status reason='the plan could not be frozen'"
      exit "$status"
    fi
    mapfile -t tasks <<<"$frozen"
    plan=${tasks[0]} tasks=("${tasks[@]:1}")
  fi
  if [ -z "$task" ]; then
    if [ -z "${SLURM_ARRAY_TASK_ID:-}" ] && [ ${#tasks[@]} != 1 ]; then
      stop_for_good "${#tasks[@]} tasks (${tasks[*]}): name one, or sbatch --array=0-$((${#tasks[@]} - 1))"
    fi
    task=${tasks[${SLURM_ARRAY_TASK_ID:-0}]:-}
    if [ -z "$task" ]; then
      stop_for_good "no task for array index $SLURM_ARRAY_TASK_ID: ${#tasks[@]} tasks (${tasks[*]})"
    fi
  fi
  # From a remote store baton brings it: this node may never have had the task.
  if [ ! -f "$plan" ] && [[ ${BATON_STORE:-} != *://* ]]; then
    stop_for_good "there is no plan $plan"
  fi
  if [ -z "${SLURM_NTASKS:-}" ] && [ "${SLURM_GPUS_ON_NODE:-1}" -gt 1 ]; then
    stop_for_good "one process for $SLURM_GPUS_ON_NODE GPUs a node; add --ntasks-per-node=$SLURM_GPUS_ON_NODE"
  fi

  # --- the leg --------------------------------------------------------------------------------

  folder=$(dirname "$plan")/tasks/$task
  log=$folder/log.txt failures=$folder/.slurm-failures
  mkdir -p "$folder/.rendezvous"
  note "log=$log"
  exec >>"$log" 2>&1

  # The processes meet at a file of this leg alone: no port and no host has to be known before.
  rm -f "$folder/.rendezvous"/*
  export BATON_RENDEZVOUS=file://$folder/.rendezvous/$job.${SLURM_RESTART_COUNT:-0}
  # Since 22.05 srun does not take this over from sbatch.
  if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi
  choose_runtime "$(dirname "$plan")" "${BATON_STORE:-}"
  run=(run "$plan" --task "$task")
  if [ -n "${BATON_STORE:-}" ]; then run+=(--store "$BATON_STORE"); fi

  if [ -n "$asked" ]; then
    status=75
  elif missing=$(missing_program); then
    # As baton's own errors begin, so that `baton status` quotes it.
    echo "error: there is no $missing on ${SLURMD_NODENAME:-$(hostname)}, which BATON_RUNTIME=$runtime needs"
    status=127
  else
    note "started host=$(hostname) nodes=${SLURM_JOB_NUM_NODES:-1} processes=${SLURM_NTASKS:-1}"
    # A process that ends early must not take down its peers, which may be saving; --wait ends those
    # that wait for a dead one.
    srun --export=ALL --kill-on-bad-exit=0 --wait="$grace" --mpi=none --input=none "${step[@]}" \
      sh -c "$process" leg "${baton[@]}" "${run[@]}" &
    srun_pid=$!
    # A signal may have come between the question and the start.
    if [ -n "$asked" ]; then kill -s USR2 "$srun_pid" 2>/dev/null || true; fi
    wait_for_srun
    srun_pid=''
    note "ended status=$status signal=${asked:-none}"
  fi

  # --- what an exit status means --------------------------------------------------------------
  #   0      finished: COMPLETED, and who waits for it may start
  #   75     handed over: again, as often as it takes (baton stops what makes no progress); 79 where
  #          this job starts nothing more: a new job goes on, or a person
  #   78     stopped: FAILED, running again cannot help
  #   138, 140, 143  died of USR1, USR2 or TERM before it could listen: as 75
  #   other  failed: again, BATON_RETRIES times in a row, then FAILED
  if [ -n "$asked" ] && [ "$status" -ge 128 ]; then status=75; fi
  case $status in
    0)
      rm -f "$failures"
      note "verdict=finished"
      exit 0
      ;;
    75 | 138 | 140 | 143)
      rm -f "$failures"
      start_again 75
      ;;
    78) stop_for_good "running again cannot help; the reason stands above" ;;
    *)
      if may_try_again; then start_again "$status"; fi
      note "verdict=failed status=$status reason='${BATON_RETRIES:-2} retries were used up'"
      exit "$status"
      ;;
  esac
}

main "$@"
