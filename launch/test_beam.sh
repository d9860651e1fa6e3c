#!/usr/bin/env bash
# Runs the tests of prepare on Apache Beam, in a separate environment (requirements-beam.txt).
#
#   bash launch/test_beam.sh           all of these tests
#   bash launch/test_beam.sh "slow"    only the tests with this marker
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
export PROXYKD_VENV="${PROXYKD_VENV:-$PWD/.venv-launch-beam}"
source launch/environment.sh

ensure_environment beam || exit 1
exec "$venv_python" -m pytest -m "${1:-}" -n 2 --durations 5 tests/texts/test_beam.py
