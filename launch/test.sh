#!/usr/bin/env bash
# Format, lint, types and tests. A fresh clone and Python are enough.
#
#   bash launch/test.sh                 all but the slow tests
#   bash launch/test.sh --slow          the slow ones: kills, notebooks, wheel and sdist
#   bash launch/test.sh tests/losses    more arguments go to pytest
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
source launch/environment.sh

marker="not slow"
if [[ ${1:-} == --slow ]]; then
  marker="slow"
  shift
fi
ensure_environment test || exit 1

failed=()
if [[ $marker != slow ]]; then
  "$venv_python" -m ruff format --check . || failed+=("ruff format --check")
  "$venv_python" -m ruff check . || failed+=("ruff check")
  "$venv_python" -m mypy || failed+=("mypy")
fi
# loadfile makes a file's expensive fixtures (compiled steps, real models) only once.
# tests/conftest.py sets the order of the files.
"$venv_python" -m pytest -m "$marker" -n 2 --dist loadfile --no-loadscope-reorder \
  --durations 30 "$@" ||
  failed+=("pytest")
if (($# == 0)); then # Beam's packages conflict with those of this environment
  PROXYKD_VENV="$venv_folder-beam" bash launch/test_beam.sh "$marker" || failed+=("Beam's pytest")
fi
if ((${#failed[@]})); then
  printf 'failed: %s\n' "${failed[@]}" >&2
  exit 1
fi
