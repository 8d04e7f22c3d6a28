#!/bin/bash
# Start a run with torchrun: one rank for each GPU of this machine, or of several machines.
#
#   one machine        launch/torchrun.sh run.toml [options of minisft.train]
#   several machines   NODES=4 NODE=0 HEAD=host-0 launch/torchrun.sh run.toml     on host-0, with NODE=1 on the next, and so on
#
# NODES: machines. NODE: the number of this one, from 0. HEAD: the name of machine 0, whose PORT the others reach. PROCESSES: ranks
# of this machine, "gpu" = one for each GPU. LOGS: folder of the output of each rank. SHUTDOWN: seconds from SIGTERM to SIGKILL, which
# must be enough for two steps and a save. RESTARTS: how often this script starts again after a rank was lost (exit code 69).
#
# Exit codes are those of minisft, which torchrun itself would replace by 1: 0 done, 75 stopped after a save, 69 a rank is gone, 71 no
# memory, others in docs/debug.md. After 69 and 75 the same command resumes at the last checkpoint. A scheduler that restarts for
# certain codes only may want another one for these two: RESUMABLE.
set -u
nodes=${NODES:-1} logs=${LOGS:-logs} restarts=${RESTARTS:-0} stopped=
mkdir -p "$logs" || exit 74

# The signal is for the ranks, which save. torchrun passes it on, waits for them, and ends with 1.
trap 'stopped=1; kill -TERM "$run" 2>/dev/null' TERM INT USR1 HUP

while :; do
  said=$(mktemp "$logs/torchrun-XXXXXX.log")
  # --redirects, --tee and the filter: all ranks write into $logs, and the first one of each machine on the console too
  torchrun --nnodes "$nodes" --node-rank "${NODE:-0}" --nproc-per-node "${PROCESSES:-gpu}" \
    --master-addr "${HEAD:-127.0.0.1}" --master-port "${PORT:-29500}" --shutdown-timeout "${SHUTDOWN:-300}" \
    --rdzv-id minisft --role rank --log-dir "$logs" --redirects 3 --tee 3 --local-ranks-filter 0 \
    -m minisft.train "$@" 2> >(tee "$said" >&2) &
  run=$!
  wait "$run"; code=$?
  while kill -0 "$run" 2>/dev/null; do wait "$run"; code=$?; done # a signal interrupts `wait`
  sleep 0.2 # until `tee` has written the last line
  # torchrun's report has the exit code of the rank that failed first; a negative one is the number of a signal
  rank_code=$(sed -n 's/.*exitcode *: *\(-\{0,1\}[0-9]\{1,3\}\) .*/\1/p' "$said" | tail -1)
  if [ "$code" -ne 0 ]; then
    if [ -n "$stopped" ]; then
      code=75
      echo "launch/torchrun.sh: stopped; the same command resumes (the traceback above is how torchrun ends after a signal)" >&2
    elif [ -n "$rank_code" ]; then code=$(( rank_code < 0 ? 69 : rank_code ))
    fi
  fi
  [ "$code" -eq 69 ] && [ -z "$stopped" ] && [ "$restarts" -gt 0 ] || break
  restarts=$((restarts - 1))
  echo "launch/torchrun.sh: a rank is gone; starting again from the last checkpoint" >&2
  sleep "${WAIT:-10}"
done
case $code in 69 | 75) exit "${RESUMABLE:-$code}" ;; esac
exit "$code"
