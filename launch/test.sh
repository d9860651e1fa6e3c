#!/usr/bin/env bash
# Checks format, lint and types, and runs the tests. It needs a fresh clone and Python.
#
#   bash launch/test.sh                 all but the slow tests
#   bash launch/test.sh --slow          the slow tests: kills, notebooks, wheel and sdist
#   bash launch/test.sh tests/losses    other arguments go to pytest
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
# With loadfile one worker runs all tests of a file, so expensive fixtures (compiled steps, real models)
# are made only once. tests/conftest.py sets the order of the files.
"$venv_python" -m pytest -m "$marker" -n 2 --dist loadfile --no-loadscope-reorder \
  --durations 20 "$@" ||
  failed+=("pytest")
if (($# == 0)); then # Beam has its own environment, because its packages conflict with these
  PROXYKD_VENV="$venv_folder-beam" bash launch/test_beam.sh "$marker" || failed+=("Beam's pytest")
fi
if ((${#failed[@]})); then
  printf 'failed: %s\n' "${failed[@]}" >&2
  exit 1
fi
