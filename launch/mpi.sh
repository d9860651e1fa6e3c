#!/usr/bin/env bash
# Runs one stage of a run with Open MPI, on machines that share a file system.
#
#   bash launch/mpi.sh align my_run.yaml -n 2 --host node1,node2
#   bash launch/mpi.sh distill my_run.yaml -n 2 --hostfile hosts
#
# Arguments after the config go to mpirun. A single process on a machine gets all devices of the machine;
# several processes get one device each. Open MPI 4 tells the processes where process 0 is. With Open
# MPI 5 set PROXYKD_COORDINATOR=HOST:PORT. If a run ends with code 75, this script starts it again, at
# most PROXYKD_RESTARTS times (20), unless the script was asked to stop (SIGTERM).
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
# mpirun forwards SIGUSR1 to the processes. After SIGTERM it would kill them within a second.
trap 'told=1; kill -USR1 "$running" 2>/dev/null' TERM USR1
for ((restart = 0; ; restart++)); do
  mpirun "$@" "${exports[@]}" "$python" -m "proxykd_jax.$stage" --config "$config" &
  running=$!
  wait "$running"
  code=$?
  while kill -0 "$running" 2>/dev/null; do # a signal interrupts `wait`, so wait again
    wait "$running"
    code=$?
  done
  # mpirun returns 137 or 143 if processes were killed.
  if ((told || restart >= restarts)) || [[ $code != 75 && $code != 137 && $code != 143 ]]; then
    exit "$code"
  fi
  echo "stage $stage ended with code $code; started again" >&2
done
