#!/bin/bash
# Builds the wheel of the Python package and installs it into .venv. Objects that the C++ build compiled before come from
# ccache, because compiler, flags and depth of the build folder are the same.
set -euo pipefail
cd "$(dirname "$0")/.."
log=build/python-install.log
mkdir -p build
export CXX=${CXX:-c++} CMAKE_BUILD_PARALLEL_LEVEL=${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)}
.venv/bin/pip install --verbose --disable-pip-version-check --no-build-isolation --no-deps --force-reinstall . >"$log" 2>&1 ||
  { tail -n 100 "$log"; exit 1; }
.venv/bin/python -c 'import tessera; print("Python package", tessera.__version__, "on", tessera.default_isa())'
