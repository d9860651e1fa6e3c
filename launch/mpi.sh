#!/usr/bin/env bash
# One stage of a run with Open MPI, on machines that share a file system.
#
#   bash launch/mpi.sh align my_run.yaml -n 2 --host node1,node2
#   bash launch/mpi.sh distill my_run.yaml -n 2 --hostfile hosts
#
# What follows the config goes to mpirun. One process a machine has all of its devices; of several a
# machine each has one. Open MPI 4 says where process 0 is; for Open MPI 5 set
# PROXYKD_COORDINATOR=HOST:PORT. Ends with code 75 where the same command shall be given again, which
# it does itself at most PROXYKD_RESTARTS times (20), unless it was told to stop (SIGTERM).
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
# mpirun passes SIGUSR1 on; after SIGTERM it would kill the processes within a second.
trap 'told=1; kill -USR1 "$running" 2>/dev/null' TERM USR1
for ((restart = 0; ; restart++)); do
  mpirun "$@" "${exports[@]}" "$python" -m "proxykd_jax.$stage" --config "$config" &
  running=$!
  wait "$running"
  code=$?
  while kill -0 "$running" 2>/dev/null; do # that wait ended with the signal
    wait "$running"
    code=$?
  done
  # 137 and 143: mpirun's for processes that were killed.
  if ((told || restart >= restarts)) || [[ $code != 75 && $code != 137 && $code != 143 ]]; then
    exit "$code"
  fi
  echo "stage $stage ended with code $code; started again" >&2
done
