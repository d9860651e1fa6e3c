#!/usr/bin/env bash
# Runs the whole method in miniature. It needs a fresh clone and Python, takes about five minutes on two
# cores, and downloads nothing but packages.
#
#   bash launch/demo.sh              writes summary.json, plots, models and metrics to runs/demo/
#   bash launch/demo.sh OTHER_DIR
#
# After a kill the same command continues.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh

out="${1:-runs/demo}"
ensure_environment run
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
# This silences warnings of libraries about things that are not installed or not used here.
export TF_CPP_MIN_LOG_LEVEL=3 TF_ENABLE_ONEDNN_OPTS=0 TRANSFORMERS_VERBOSITY=error
# Each stage is a process. With the cache it reuses programs that earlier stages compiled.
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$out/.compiled}"
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.2

stage() { # stage NAME COMMAND...: runs a command of the package and records its seconds
  local name=$1 began=$SECONDS
  shift
  printf '\n== %s: python -m %s\n' "$name" "$*"
  "$venv_python" -m "$@"
  printf '%s\t%s\n' "$name" "$((SECONDS - began))" >>"$out/times.tsv"
}

mkdir -p "$out"
config="$out/configs/proxy_kd.yaml"
stage "miniature" benchmarks.miniature.make --out "$out"
# From here on this is an ordinary run: two models, a file of a teacher's answers, and one config.
stage "align" proxykd_jax.align --config "$config"
stage "distill" proxykd_jax.distill --config "$config"
stage "evaluate" proxykd_jax.evaluate --config "$config"
# Trains and evaluates the students that Proxy-KD is compared with, in one process.
stage "comparisons" benchmarks.miniature.students --out "$out"
# This step records its own time before it writes summary.json, so it does not use `stage`.
"$venv_python" -m benchmarks.miniature.report --out "$out"
