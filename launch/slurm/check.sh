#!/usr/bin/env bash
# Starts SLURM on this machine alone, to try stage.sbatch: munged, slurmctld and slurmd, with this machine
# as the only node. Then it runs the command, and stops SLURM again.
#
#   sudo apt-get install slurm-wlm munge
#   sudo bash launch/slurm/check.sh COMMAND...      for example srun --ntasks=2 hostname
#
# It needs root, and a machine on which no other SLURM runs.
set -euo pipefail

if (($# == 0)); then
  echo "usage: launch/slurm/check.sh COMMAND..." >&2
  exit 2
fi
if [[ $EUID != 0 ]] || ! command -v slurmctld slurmd munged >/dev/null; then
  echo "error: needs root, and slurmctld, slurmd and munged (slurm-wlm, munge)" >&2
  exit 2
fi
folder=$(mktemp -d)
started=()
finish() {
  kill "${started[@]}" 2>/dev/null || true
  wait "${started[@]}" 2>/dev/null || true
  rm -rf "$folder"
}
trap finish EXIT

host=$(hostname -s)
memory=$(awk '/MemTotal/ {print int($2 / 1024 * 0.9)}' /proc/meminfo)
mkdir -p "$folder/state" "$folder/spool"
cat >"$folder/slurm.conf" <<CONF
ClusterName=check
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket,cred_expire=15
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
KillWait=30
MinJobAge=300
# Lets a requeued job start again within seconds.
SchedulerParameters=requeue_delay=1,sched_interval=1,bf_interval=1
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(nproc) RealMemory=$memory
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF

(umask 077 && head -c 1024 /dev/urandom >"$folder/munge.key")
chown -R munge: "$folder/munge.key" 2>/dev/null || true
munged --foreground --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" \
  --pid-file="$folder/munged.pid" --log-file="$folder/munged.log" --seed-file="$folder/munge.seed" \
  >"$folder/munged.out" 2>&1 &
started+=($!)
export SLURM_CONF=$folder/slurm.conf
while [[ ! -S $folder/munge.socket ]]; do sleep 0.1; done
slurmctld -D >"$folder/slurmctld.log" 2>&1 &
started+=($!)
slurmd -D >"$folder/slurmd.log" 2>&1 &
started+=($!)
for ((i = 0; i < 100; i++)); do
  if sinfo --noheader --format=%T 2>/dev/null | grep -q '^idle$'; then
    break
  fi
  sleep 0.3
done
if ! sinfo --noheader --format=%T 2>/dev/null | grep -q '^idle$'; then
  tail -n 20 "$folder"/*.log "$folder"/*.out >&2
  exit 1
fi
"$@"
