#!/bin/bash
# Cross-compiles for 64-bit Arm (the portable kernels) with Debian's compiler and runs the result under qemu-user: the
# tests of some layers, attention against the float64 reference, a model. The Arm libraries are unpacked beside the
# build; the package lists of the system stay as they are. Needs the Debian packages g++-aarch64-linux-gnu, qemu-user and
# those of the build. usage: scripts/check-aarch64.sh [--no-cli] [LAYER ...]      default: core io plan
set -euo pipefail
cd "$(dirname "$0")/.."
cli=true
[[ ${1:-} != --no-cli ]] || { cli=false; shift; }
layers=("$@")
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
make_targets() { cmake --build "$build" --parallel "$(nproc)" --target "$@" >"$build/build.log" 2>&1 || { tail -n 60 "$build/build.log"; exit 1; }; }

for layer in "${layers[@]}"; do
  make_targets "test_$layer"
  "${emulate[@]}" "$build/tests/test_$layer" --gtest_brief=1 >"$build/test_$layer.log" 2>&1 ||
    { tail -n 60 "$build/test_$layer.log"; exit 1; }
  tail -n 1 "$build/test_$layer.log" | sed "s/^/aarch64, $layer: /"
done
$cli || exit 0

make_targets tessera_cli
tessera=("${emulate[@]}" "$build/bin/tessera")
python3 - "$build/qkv.safetensors" <<'PYTHON'
import json
import random
import struct
import sys

random.seed(0)
header, data = {}, b""
for name, heads in (("q", 4), ("k", 2), ("v", 2)):
    numbers = [random.gauss(0, 1) for _ in range(heads * 200 * 48)]
    start = len(data)
    data += struct.pack(f"<{len(numbers)}f", *numbers)
    header[name] = {"dtype": "F32", "shape": [1, heads, 200, 48], "data_offsets": [start, len(data)]}
text = json.dumps(header).encode()
open(sys.argv[1], "wb").write(struct.pack("<Q", len(text)) + text + data)
PYTHON
"${tessera[@]}" attend --qkv "$build/qkv.safetensors" --causal --compare --json | python3 -c '
import json, sys
error = json.load(sys.stdin)["error"]["rel_l2"]
assert error < 1e-5, error
print("aarch64, dense attention: relative error", error)'
for method in streaming:n_init=16,n_local=32 xattention:block=32,stride=8 moba:block_size=32; do
  "${tessera[@]}" attend --qkv "$build/qkv.safetensors" --method "$method" --causal --json >/dev/null
  echo "aarch64, $method: runs"
done
printf 'The pass key is 4821. The pass key is' | "${tessera[@]}" run --model models/tessera-bytes --prompt - -n 4 --json |
  python3 -c 'import json, sys; print("aarch64, a model writes", repr(json.load(sys.stdin)["text"]))'
