#!/bin/bash
# Runs the tests of one build: C++ and command line (ctest), then Python (pytest), for which the package is built.
# usage: scripts/run-tests.sh PRESET
set -euo pipefail
preset=$1
build=build/$preset
summary=$build/test-summary.txt
rm -f "$summary"

# Tests use two threads each; more of them at once than half the processors would only make them wait.
jobs=$(($(nproc) / 2))
ctest --preset "$preset" --parallel $((jobs > 0 ? jobs : 1)) --quiet --output-log "$build/ctest.log" --output-on-failure ||
  { grep -v ' Passed ' "$build/ctest.log" | tail -n 200; exit 1; }
grep -E 'tests passed' "$build/ctest.log" | sed 's/^/C++ and command line (ctest): /' | tee "$summary"

python_tests=(training)
if [[ -d tests/integration ]]; then python_tests+=(tests/integration); fi
OMP_WAIT_POLICY=passive TESSERA_CLI=$PWD/$build/bin/tessera .venv/bin/python -m pytest -q -ra -p no:cacheprovider "${python_tests[@]}" 2>&1 |
  tee "$build/pytest.log"
tail -n 1 "$build/pytest.log" | sed 's/^/Python integration and training (pytest): /' >>"$summary"
scripts/install-python.sh
OMP_WAIT_POLICY=passive OMP_NUM_THREADS=2 .venv/bin/python -m pytest -q -ra -p no:cacheprovider python/tests 2>&1 |
  tee "$build/python.log"
tail -n 1 "$build/python.log" | sed 's/^/Python package (pytest): /' >>"$summary"
TESSERA_CLI=$PWD/$build/bin/tessera .venv/bin/python -m pytest -q -ra -p no:cacheprovider tests/browser 2>&1 |
  tee "$build/browser.log"
tail -n 1 "$build/browser.log" | sed 's/^/pages in a browser (pytest): /' >>"$summary"

echo
cat "$summary"
