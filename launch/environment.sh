# shellcheck shell=bash
# The other scripts of this folder source this file, from the root of the checkout.
#
#   ensure_environment run    makes .venv-launch with the packages for runs (requirements.txt)
#   ensure_environment test   adds the packages for tests, including PyTorch
#   ensure_environment beam   makes another environment, for prepare on Apache Beam and its tests
#   "$venv_python"            is the environment's interpreter afterwards
#
# A call is fast if nothing has changed. PYTHON names the base interpreter (3.11 to 3.13). PROXYKD_VENV
# names another folder for the environment.

venv_folder="${PROXYKD_VENV:-$PWD/.venv-launch}"
venv_python="$venv_folder/bin/python"

find_python() { # prints the first interpreter with a supported version
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} python3.11 python3.12 python3.13 python3 python; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
      2>/dev/null; then
      command -v "$candidate"
      return 0
    fi
    if [[ -n ${PYTHON:-} ]]; then
      break # if PYTHON is set, no other interpreter is tried
    fi
  done
  echo "error: no Python 3.11, 3.12 or 3.13 found; install one, or name it: PYTHON=/path/to/python3" >&2
  return 1
}

make_venv() {
  local python
  python=$(find_python) || return 1
  echo "making $venv_folder with $("$python" --version)" >&2
  if "$python" -m venv --clear "$venv_folder" 2>/dev/null; then
    return 0
  fi
  # Debian and Ubuntu package ensurepip separately; uv or another pip can replace it.
  if command -v uv >/dev/null; then
    uv venv --quiet --clear --seed --python "$python" "$venv_folder"
  elif "$python" -m pip --version >/dev/null 2>&1; then
    "$python" -m venv --clear --without-pip "$venv_folder" &&
      "$python" -m pip --python "$venv_python" install --quiet pip
  else
    echo "error: $python cannot make an environment; install its venv package (python3-venv)" >&2
    return 1
  fi
}

requirements_hash() { # prints a hash of the given files, pyproject.toml and the interpreter's version
  "$venv_python" - "$@" <<'PYTHON'
import hashlib, pathlib, sys

state = hashlib.sha256(sys.version.encode())
for name in ["pyproject.toml", *sys.argv[1:]]:
    state.update(pathlib.Path(name).read_bytes())
print(state.hexdigest())
PYTHON
}

# XLA's CUDA compiler, for tests of plans. It is installed beside the environment: inside, it would
# make jax look for a GPU at every start. If it cannot be installed, the tests that need it are skipped.
install_compilers() {
  local version folder="$venv_folder/compilers"
  version=$("$venv_python" -c 'import jaxlib; print(jaxlib.__version__)') || return 1
  rm -rf "$folder"
  if ! "$venv_python" -m pip install --quiet --disable-pip-version-check --no-deps \
    --target "$folder" "jax-cuda13-plugin==$version" "jax-cuda13-pjrt==$version"; then
    echo "note: no CUDA compiler for jaxlib $version here; its tests will be skipped" >&2
    rm -rf "$folder"
  fi
}

# Compile bytecode, because tests start hundreds of processes. uv installs packages without bytecode,
# and many CI machines do not let Python write it. Then each process compiles everything that it
# imports: 10 of 17 CPU-seconds for jax, TensorFlow, transformers and Orbax.
keep_bytecode() {
  local folder=$venv_folder
  if [[ $folder != /* ]]; then
    folder="$PWD/$folder" # absolute, because processes start in other folders
  fi
  unset PYTHONDONTWRITEBYTECODE
  export PYTHONPYCACHEPREFIX="$folder/bytecode"
}

install() { # uses uv, which takes seconds instead of minutes, and pip if uv fails
  "$venv_python" -m uv pip install --quiet --python "$venv_python" "$@" ||
    "$venv_python" -m pip install --quiet "$@"
}

ensure_environment() {
  local layer=$1 files stamp hash
  case $layer in
    run) files=(requirements.txt) ;;
    test) files=(requirements.txt requirements-torch.txt requirements-test.txt) ;;
    beam) files=(requirements-beam.txt) ;;
    *)
      echo "error: ensure_environment run|test|beam, not '$layer'" >&2
      return 1
      ;;
  esac
  if [[ $layer != run ]]; then
    keep_bytecode
  fi
  if ! "$venv_python" -c '' 2>/dev/null; then
    make_venv || return 1
  fi
  stamp="$venv_folder/proxykd-$layer.stamp"
  hash=$(requirements_hash "${files[@]}") || return 1
  if [[ -f $stamp && $(<"$stamp") == "$hash" ]]; then
    return 0
  fi
  echo "installing the packages of ${files[*]}" >&2
  rm -f "$stamp"
  "$venv_python" -m pip install --quiet --disable-pip-version-check uv || return 1
  if [[ $layer == test ]]; then
    # PyTorch comes first and from pip. Otherwise peft would install the build with CUDA.
    "$venv_python" -m pip install --quiet --disable-pip-version-check -r requirements-torch.txt ||
      return 1
    install --no-deps -r requirements.txt -r requirements-test.txt || return 1
    install_compilers || return 1
  else
    install --no-deps -r "${files[0]}" || return 1
  fi
  install --no-deps --editable . || return 1
  echo "$hash" >"$stamp"
}
