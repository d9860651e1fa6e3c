#!/usr/bin/env bash
# One stage of a run on a Cloud TPU slice: the same command on every host of it.
#
#   TPU=my-v5p-16 ZONE=us-east5-a bash launch/tpu.sh align my_run.yaml
#
# Needs gcloud, the checkout with its .venv-launch (pip install ".[tpu]") in the same folder of every
# host (FOLDER, by default proxykd_jax in the home folder), and runs_dir on a file system that all
# hosts share (Filestore, or Cloud Storage by gcsfuse). jax finds the hosts by itself. A host that is
# preempted ends the others; give the same command again when the slice is back.
set -euo pipefail

stage=${1:?"usage: TPU=name ZONE=zone launch/tpu.sh STAGE CONFIG [--set KEY=VALUE ...]"}
config=${2:?"usage: TPU=name ZONE=zone launch/tpu.sh STAGE CONFIG [--set KEY=VALUE ...]"}
shift 2
: "${TPU:?"set TPU to the name of the slice"}" "${ZONE:?"set ZONE to its zone"}"

printf -v command '%q ' .venv-launch/bin/python -m "proxykd_jax.$stage" --config "$config" "$@"
exec gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all \
  --command="cd ${FOLDER:-proxykd_jax} && $command"
