#!/usr/bin/env bash
# Rewrites requirements.txt, requirements-test.txt and requirements-beam.txt from pyproject.toml, with
# the newest versions that its bounds allow, for Python 3.11 to 3.13. It needs uv on the path.
set -euo pipefail
cd "$(dirname "$0")/.."

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
compile=(uv pip compile --quiet --universal --python-version 3.11 --no-header
  --annotation-style line)

"${compile[@]}" pyproject.toml --extra plots -o "$work/runtime.txt"
# PyTorch has a separate file. Here it must not add its CUDA packages.
echo "torch; sys_platform == 'never'" >"$work/no_torch.txt"
"${compile[@]}" --group test --overrides "$work/no_torch.txt" -c "$work/runtime.txt" \
  -o "$work/test.txt"
# Apache Beam needs older versions of some packages, so its environment has a separate list.
"${compile[@]}" pyproject.toml --extra beam --group test-beam -o "$work/beam.txt"

tidy() { # removes this run's paths from comments, and packages that no platform installs
  sed -e "s#, -c $work/[a-z]*\.txt##; s#  *\# via -c $work/[a-z]*\.txt\$##; s#, --override [^,]*##" \
    "$1" | grep -v -e "sys_platform == 'never'" -e "sys_platform == 'emscripten'"
}
{
  echo "# Exact versions of everything a run needs, with the extra 'plots'. Made by"
  echo "# launch/compile_requirements.sh from pyproject.toml; Python 3.11 keeps an older JAX."
  tidy "$work/runtime.txt"
} >requirements.txt
{
  echo "# What the tests need beside requirements.txt and requirements-torch.txt. Made by"
  echo "# launch/compile_requirements.sh. Install PyTorch first: pip then leaves it alone."
  tidy "$work/test.txt"
} >requirements-test.txt
{
  echo "# Exact versions of everything that prepare on Apache Beam needs, with its tests: a whole"
  echo "# environment, not an addition to requirements.txt. Made by launch/compile_requirements.sh."
  tidy "$work/beam.txt"
} >requirements-beam.txt
