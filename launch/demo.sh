#!/usr/bin/env bash
# The whole method in miniature, from a fresh clone with nothing but Python: about five minutes on
# two cores, no download beyond packages.
#
#   bash launch/demo.sh              leaves runs/demo/: summary.json, plots, models, metrics
#   bash launch/demo.sh OTHER_DIR
#
# Killed and started again, it goes on where it was.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh

out="${1:-runs/demo}"
ensure_environment run
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
# Remarks of libraries on what is not installed or not used here.
export TF_CPP_MIN_LOG_LEVEL=3 TF_ENABLE_ONEDNN_OPTS=0 TRANSFORMERS_VERBOSITY=error
# The stages are processes of their own; a program that one compiled serves the next.
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$out/.compiled}"
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.2

stage() { # stage NAME COMMAND...: runs a command of the package and notes its seconds
  local name=$1 began=$SECONDS
  shift
  printf '\n== %s: python -m %s\n' "$name" "$*"
  "$venv_python" -m "$@"
  printf '%s\t%s\n' "$name" "$((SECONDS - began))" >>"$out/times.tsv"
}

mkdir -p "$out"
config="$out/configs/proxy_kd.yaml"
stage "miniature" benchmarks.miniature.make --out "$out"
# A user's run from here on: two models, a file of a teacher's answers, one config.
stage "align" proxykd_jax.align --config "$config"
stage "distill" proxykd_jax.distill --config "$config"
stage "evaluate" proxykd_jax.evaluate --config "$config"
# The same for the students that it is compared with, in one process.
stage "comparisons" benchmarks.miniature.students --out "$out"
# Notes its own time, before it writes summary.json.
"$venv_python" -m benchmarks.miniature.report --out "$out"
