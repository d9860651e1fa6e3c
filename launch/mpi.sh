#!/usr/bin/env bash
# One stage of a run with Open MPI, on machines that share a file system.
#
#   bash launch/mpi.sh align my_run.yaml -n 2 --host node1,node2
#   bash launch/mpi.sh distill my_run.yaml -n 2 --hostfile hosts
#
# Arguments after the config go to mpirun. A single process on a machine gets all of its devices;
# several processes get one each. Open MPI 4 tells where process 0 is; for Open MPI 5 set
# PROXYKD_COORDINATOR=HOST:PORT. If a run ends with code 75, this script starts it again, at most
# PROXYKD_RESTARTS times (20), unless it was asked to stop (SIGTERM).
set -uo pipefail

stage=${1:?"usage: launch/mpi.sh STAGE CONFIG [options of mpirun]"}
config=${2:?"usage: launch/mpi.sh STAGE CONFIG [options of mpirun]"}
shift 2
python=${PROXYKD_PYTHON:-$PWD/.venv-launch/bin/python}
restarts=${PROXYKD_RESTARTS:-20}
exports=()
for name in PROXYKD_COORDINATOR JAX_PLATFORMS JAX_NUM_CPU_DEVICES JAX_COMPILATION_CACHE_DIR \
  XLA_FLAGS PYTHONPATH; do
  if [[ -n ${!name:-} ]]; then
    exports+=(-x "$name")
  fi
done

told=0
# mpirun forwards SIGUSR1. After SIGTERM it would kill the processes within a second.
trap 'told=1; kill -USR1 "$running" 2>/dev/null' TERM USR1
for ((restart = 0; ; restart++)); do
  mpirun "$@" "${exports[@]}" "$python" -m "proxykd_jax.$stage" --config "$config" &
  running=$!
  wait "$running"
  code=$?
  while kill -0 "$running" 2>/dev/null; do # the signal interrupted that wait
    wait "$running"
    code=$?
  done
  # 137 and 143: mpirun's codes for killed processes.
  if ((told || restart >= restarts)) || [[ $code != 75 && $code != 137 && $code != 143 ]]; then
    exit "$code"
  fi
  echo "stage $stage ended with code $code; started again" >&2
done
