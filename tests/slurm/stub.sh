#!/usr/bin/env bash
# Stands in for `python -m baton run PLAN --task TASK`: ends each leg as a script says.
# The words of $BATON_STORE/TASK.script, one a leg: an exit status; `listen`: hand over when
# signalled; `late`: only when out of time; `deaf`: die of the signal. What happened is left in $BATON_STORE/TASK.legs.
set -euo pipefail

while [ $# -gt 0 ]; do
  if [ "$1" = --task ]; then task=$2; fi
  shift
done
legs=$BATON_STORE/$task.legs
read -ra script <"$BATON_STORE/$task.script"
leg=$(if [ -f "$legs" ]; then wc -l <"$legs"; else echo 0; fi)
word=${script[$leg]:-${script[-1]}} # a process that looks after the first one wrote
if [ "${SLURM_PROCID:-0}" = 0 ]; then
  echo "$word rank=$RANK/$WORLD_SIZE/$LOCAL_RANK submission=$BATON_SUBMISSION token=${HF_TOKEN:+given}" >>"$legs"
fi
case $word in
  listen)
    trap 'exit 75' USR2 TERM
    sleep 300 &
    wait
    ;;
  late)
    trap '' USR2
    trap 'exit 75' TERM
    # Not one long sleep: bash runs a trap when the command before it has ended.
    while true; do sleep 0.1; done
    ;;
  deaf) exec sleep 300 ;;
  *) exit "$word" ;;
esac
