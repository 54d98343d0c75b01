#!/bin/bash
# Builds the library, the command line and tests for 64-bit Arm with Debian's cross compiler, and runs some of them under
# qemu-user. The Arm libraries are unpacked beside the build; the system's own package lists stay as they are.
# usage: scripts/check-aarch64.sh [LAYER ...]      tests of these layers are built and run whole; default: core io plan
set -euo pipefail
cd "$(dirname "$0")/.."
layers=("${@:-core}")
[[ $# -gt 0 ]] || layers=(core io plan)
build=build/aarch64
root=$PWD/$build/root

if [[ ! -e $root/complete ]]; then
  state=$PWD/$build/apt
  mkdir -p "$state"/{lists/partial,cache/archives/partial,packages} "$root"
  touch "$state/status"
  arm=(-qq -o APT::Architecture=arm64 -o APT::Architectures::=arm64 -o APT::Sandbox::User=root
    -o "Dir::State=$state" -o "Dir::State::status=$state/status" -o "Dir::State::lists=$state/lists" -o "Dir::Cache=$state/cache")
  apt-get "${arm[@]}" update
  (cd "$state/packages" && apt-get "${arm[@]}" download libfmt-dev libfmt9 libdnnl-dev libdnnl2 libpng-dev libpng16-16 \
    zlib1g-dev zlib1g ocl-icd-opencl-dev ocl-icd-libopencl1 opencl-c-headers opencl-clhpp-headers libgtest-dev libgmock-dev \
    nlohmann-json3-dev libcli11-dev)
  for package in "$state"/packages/*.deb; do dpkg-deb --extract "$package" "$root"; done
  touch "$root/complete"
fi

mkdir -p "$build"
emulate=(qemu-aarch64 -L /usr/aarch64-linux-gnu
  -E "LD_LIBRARY_PATH=$root/usr/lib/aarch64-linux-gnu:$root/lib/aarch64-linux-gnu" -E OMP_NUM_THREADS=2 -E OMP_WAIT_POLICY=passive)
cmake -S . -B "$build" -G Ninja -DCMAKE_TOOLCHAIN_FILE="$PWD/cmake/aarch64-linux-gnu.cmake" -DTESSERA_ARM_ROOT="$root" \
  -DCMAKE_BUILD_TYPE=Release -DTESSERA_BUILD_BENCHMARKS=OFF -DTESSERA_EMULATED_LEVELS=OFF \
  -DCMAKE_CROSSCOMPILING_EMULATOR="$(IFS=";"; echo "${emulate[*]}")" -DTESSERA_CHART_JS="$(find /usr/share/javascript/chart.js /usr/share/nodejs/chart.js -name chart.min.js 2>/dev/null | head -n 1)" \
  >"$build/configure.log" 2>&1 || { cat "$build/configure.log"; exit 1; }
cmake --build "$build" --parallel "$(nproc)" --target tessera_cli "${layers[@]/#/test_}" >"$build/build.log" 2>&1 ||
  { tail -n 60 "$build/build.log"; exit 1; }

for layer in "${layers[@]}"; do
  "${emulate[@]}" "$build/tests/test_$layer" --gtest_brief=1 2>&1 | tail -n 3
done
# Attention against the float64 reference, dense and sparse, and a model that answers.
tessera=("${emulate[@]}" "$build/bin/tessera")
.venv/bin/python - "$build/qkv.safetensors" <<'PYTHON'
import sys
import numpy as np
from safetensors.numpy import save_file

rng = np.random.default_rng(0)
save_file({n: rng.standard_normal((1, h, 200, 48)).astype(np.float32) for n, h in (("q", 4), ("k", 2), ("v", 2))}, sys.argv[1])
PYTHON
for method in dense streaming:n_init=16,n_local=32 xattention:block=32,stride=8 moba:block_size=32; do
  "${tessera[@]}" attend --qkv "$build/qkv.safetensors" --method "$method" --causal --compare --json >"$build/attend.json"
  python3 - "$method" "$build/attend.json" <<'PYTHON'
import json
import sys

report = json.load(open(sys.argv[2]))
print("aarch64:", sys.argv[1], {key: report[key] for key in ("isa", "density", "error") if key in report})
PYTHON
done
printf 'The pass key is 4821. The pass key is' | "${tessera[@]}" run --model models/tessera-bytes --prompt - -n 4 --json |
  python3 -c 'import json, sys; report = json.load(sys.stdin); print("aarch64: a model writes", repr(report["text"]))'
