#!/usr/bin/env bash
# Runs one stage of a run on one machine, as a single process with all GPUs.
#
#   bash launch/one_machine.sh align configs/llama2_70b_to_7b.yaml --set mesh.tensor=8
#   CUDA_VISIBLE_DEVICES=0,1 bash launch/one_machine.sh distill my_run.yaml
#   PROCESSES=2 bash launch/one_machine.sh align my_run.yaml    several processes on CPUs, to try them
#
# After SIGTERM the run saves a checkpoint and ends with code 75. The same command continues it.
set -uo pipefail

stage=${1:?"usage: launch/one_machine.sh STAGE CONFIG [--set KEY=VALUE ...]"}
config=${2:?"usage: launch/one_machine.sh STAGE CONFIG [--set KEY=VALUE ...]"}
shift 2
python=${PROXYKD_PYTHON:-$PWD/.venv-launch/bin/python}
count=${PROCESSES:-1}
if ((count == 1)); then
  exec "$python" -m "proxykd_jax.$stage" --config "$config" "$@"
fi

export PROXYKD_COORDINATOR=127.0.0.1:${PORT:-$((61440 + $$ % 4096))}
export PROXYKD_NUM_PROCESSES=$count
running=()
for ((index = 0; index < count; index++)); do
  PROXYKD_PROCESS_INDEX=$index "$python" -m "proxykd_jax.$stage" --config "$config" "$@" &
  running+=($!)
done
trap 'kill -TERM "${running[@]}" 2>/dev/null' TERM INT
status=0
for process in "${running[@]}"; do
  wait "$process"
  code=$?
  while kill -0 "$process" 2>/dev/null; do # a signal interrupts `wait`, so wait again
    wait "$process"
    code=$?
  done
  ((code > status)) && status=$code
done
exit "$status"
