#!/usr/bin/env bash
# Runs one stage of a run on a Cloud TPU slice. It starts the same command on every host.
#
#   TPU=my-v5p-16 ZONE=us-east5-a bash launch/tpu.sh align my_run.yaml
#
# It needs gcloud. Every host needs a checkout with .venv-launch (pip install ".[tpu]") in the same
# folder (FOLDER, by default proxykd_jax in the home folder). runs_dir must be on a file system that
# all hosts share (Filestore, or Cloud Storage with gcsfuse). jax finds the hosts itself. If one host
# is preempted, the others end too. Run the same command again when the slice is back.
set -euo pipefail

stage=${1:?"usage: TPU=name ZONE=zone launch/tpu.sh STAGE CONFIG [--set KEY=VALUE ...]"}
config=${2:?"usage: TPU=name ZONE=zone launch/tpu.sh STAGE CONFIG [--set KEY=VALUE ...]"}
shift 2
: "${TPU:?"set TPU to the name of the slice"}" "${ZONE:?"set ZONE to its zone"}"

printf -v command '%q ' .venv-launch/bin/python -m "proxykd_jax.$stage" --config "$config" "$@"
exec gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all \
  --command="cd ${FOLDER:-proxykd_jax} && $command"
