#!/usr/bin/env bash
# The tests of prepare on Apache Beam, in a separate environment (requirements-beam.txt).
#
#   bash launch/test_beam.sh           all of them
#   bash launch/test_beam.sh "slow"    those with this marker
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
export PROXYKD_VENV="${PROXYKD_VENV:-$PWD/.venv-launch-beam}"
source launch/environment.sh

ensure_environment beam || exit 1
exec "$venv_python" -m pytest -m "${1:-}" -n 2 --durations 5 tests/texts/test_beam.py
