#!/bin/bash
set -euo pipefail
cd "$(dirname "$0")/.."
help() {
  cat <<'TEXT'
Cross-compiles for 64-bit Arm with Debian's compiler and runs the result under qemu-user.

usage: scripts/check-aarch64.sh [--cli] [--wheel] [LAYER[:FILTER] ...]

  LAYER     builds and runs the C++ tests of a layer: core, io, plan, cache, kernels, score, recurrent, methods, model,
            eval, tune, view, or `all`; FILTER is one of GoogleTest, such as kernels:'Backward*'
  --cli     the command line: its instruction sets, attention on each of them against the float64 reference, a model
  --wheel   a wheel of the Python package for Arm, by cross compilation with nanobind's sources from .venv, and one
            attention call in an emulated Python

Without arguments, as in CI: all layers. Emulation takes some 250 times as long as the machine itself. The Arm libraries
are unpacked beside the build; the package lists of the system stay as they are.
Needs the Debian packages of scripts/install-packages.sh build test cross.
TEXT
}

cli=false
wheel=false
layers=()
all_layers=(core io plan cache kernels score recurrent methods model eval tune view)
for argument in "$@"; do
  case $argument in
    -h | --help) help && exit 0 ;;
    --cli) cli=true ;;
    --wheel) wheel=true ;;
    -*) echo "check-aarch64: unknown option '$argument'; see --help" >&2 && exit 2 ;;
    all) layers+=("${all_layers[@]}") ;;
    *) layers+=("$argument") ;;
  esac
done
[[ $# -gt 0 ]] || layers=("${all_layers[@]}")
build=build/aarch64
root=$PWD/$build/root
triple=aarch64-linux-gnu

packages=(libfmt-dev libfmt9 libdnnl-dev libdnnl2 libpng-dev libpng16-16 zlib1g-dev zlib1g ocl-icd-opencl-dev
  ocl-icd-libopencl1 opencl-c-headers opencl-clhpp-headers libgtest-dev libgmock-dev nlohmann-json3-dev libcli11-dev
  libpcre2-dev libpcre2-8-0 libutf8proc-dev libutf8proc2)
! $wheel || packages+=(libpython3.11-dev libpython3.11-minimal libpython3.11-stdlib python3.11-minimal libexpat1
  libffi8 libssl3 libbz2-1.0 liblzma5)
state=$PWD/$build/apt
mkdir -p "$state"/{lists/partial,cache/archives/partial,packages,unpacked} "$root"
missing=()
for package in "${packages[@]}"; do [[ -e $state/unpacked/$package ]] || missing+=("$package"); done
if [[ ${#missing[@]} -gt 0 ]]; then
  touch "$state/status"
  arm=(-qq -o APT::Architecture=arm64 -o APT::Architectures::=arm64 -o APT::Sandbox::User=root
    -o "Dir::State=$state" -o "Dir::State::status=$state/status" -o "Dir::State::lists=$state/lists" -o "Dir::Cache=$state/cache")
  apt-get "${arm[@]}" update
  (cd "$state/packages" && apt-get "${arm[@]}" download "${missing[@]}")
  for package in "${missing[@]}"; do
    dpkg-deb --extract "$state/packages/${package}_"*.deb "$root"
    touch "$state/unpacked/$package"
  done
fi

emulate=(qemu-aarch64 -L "/usr/$triple" -E "LD_LIBRARY_PATH=$root/usr/lib/$triple:$root/lib/$triple"
  -E OMP_NUM_THREADS=2 -E OMP_WAIT_POLICY=passive)
chart=$(find /usr/share/javascript/chart.js /usr/share/nodejs/chart.js -name chart.min.js 2>/dev/null | head -n 1) || true
configure=(-G Ninja -DCMAKE_TOOLCHAIN_FILE="$PWD/cmake/aarch64-linux-gnu.cmake" -DTESSERA_ARM_ROOT="$root" -DCMAKE_BUILD_TYPE=Release
  -DTESSERA_BUILD_BENCHMARKS=OFF -DTESSERA_EMULATED_LEVELS=OFF
  "-DTESSERA_CHART_JS=$chart")
log_of() { # file, command: the command's output goes to the file, and its end is shown when it fails
  "${@:2}" >"$1" 2>&1 || { tail -n 60 "$1"; return 1; }
}
make_targets() { log_of "$build/build.log" cmake --build "$build" --parallel "$(nproc)" --target "$@"; }

if $cli || [[ ${#layers[@]} -gt 0 ]]; then
  log_of "$build/configure.log" cmake -S . -B "$build" "${configure[@]}" \
    -DTESSERA_BUILD_CLI=ON -DTESSERA_BUILD_TESTS=ON -DTESSERA_BUILD_PYTHON=OFF \
    -DCMAKE_CROSSCOMPILING_EMULATOR="$(IFS=";"; echo "${emulate[*]}")"
fi
# One test at a time on every processor, in one thread but where it asks for more. A test takes from milliseconds to
# minutes, hence more shards than processors.
run_tests() { # layer, filter: how many tests passed
  local shard shards=$((4 * $(nproc)))
  rm -f "$build/test_$1".*
  for ((shard = 0; shard < shards; ++shard)); do
    [[ $(jobs -rp | wc -l) -lt $(nproc) ]] || wait -n || true
    { GTEST_TOTAL_SHARDS=$shards GTEST_SHARD_INDEX=$shard \
      log_of "$build/test_$1.$shard.log" "${emulate[@]}" -E OMP_NUM_THREADS=1 "$build/tests/test_$1" --gtest_brief=1 --gtest_filter="$2" >&2 ||
      touch "$build/test_$1.failed"; } &
  done
  wait
  [[ ! -e $build/test_$1.failed ]] || return 1
  awk '/PASSED/ { for (i = 1; i < NF; ++i) if ($(i + 1) ~ /^tests?/) sum += $i } END { print sum + 0 }' "$build/test_$1".*.log
}
for layer in "${layers[@]}"; do
  filter='*'
  [[ $layer != *:* ]] || filter=${layer#*:}
  layer=${layer%%:*}
  start=$SECONDS
  make_targets "test_$layer"
  built=$SECONDS
  passed=$(run_tests "$layer" "$filter")
  [[ $passed -gt 0 ]] || { echo "check-aarch64: $layer: no test matches '$filter'" >&2; exit 1; }
  echo "aarch64, $layer: $passed tests passed, built in $((built - start)) s, run in $((SECONDS - built)) s"
done

if $cli; then
  make_targets tessera_cli
  tessera=("${emulate[@]}" "$build/bin/tessera")
  "${tessera[@]}" bench peak --json | python3 -c '
import json, sys
sets = [peak["isa"] for peak in json.load(sys.stdin)["peaks"]]
assert "portable" in sets and "neon" in sets, sets
print("aarch64, instruction sets:", *sets)'
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
  for isa in portable neon; do
    "${emulate[@]}" -E TESSERA_ISA=$isa "$build/bin/tessera" attend --qkv "$build/qkv.safetensors" --causal --compare --json | python3 -c '
import json, sys
error = json.load(sys.stdin)["error"]["rel_l2"]
assert error < 1e-5, error
print(f"aarch64, dense attention on {sys.argv[1]}: relative error {error:.1e}")' $isa
  done
  for method in streaming:n_init=16,n_local=32 xattention:block=32,stride=8 moba:block_size=32; do
    "${tessera[@]}" attend --qkv "$build/qkv.safetensors" --method "$method" --causal --json >/dev/null
    echo "aarch64, $method: runs"
  done
  printf 'The pass key is 4821. The pass key is' | "${tessera[@]}" run --model models/tessera-bytes --prompt - -n 4 --json |
    python3 -c 'import json, sys; print("aarch64, a model writes", repr(json.load(sys.stdin)["text"]))'
fi

if $wheel; then
  python=.venv/bin/python
  [[ $($python -c 'import sys; print("%d.%d" % sys.version_info[:2])') == 3.11 ]] ||
    { echo "check-aarch64: the wheel is built against Debian's headers of Python 3.11; .venv has another version" >&2; exit 1; }
  mkdir -p "$build/wheel"
  rm -rf "$build"/wheel/*
  target_python=("${emulate[@]}" -E "PYTHONHOME=$root/usr" "$root/usr/bin/python3.11")
  options=(-C "cmake.define.TESSERA_TARGET_PYTHON=$(IFS=";"; echo "${target_python[*]}")")
  for option in "${configure[@]:2}" "-DPython_INCLUDE_DIR=$root/usr/include/python3.11"; do options+=(-C "cmake.define.${option#-D}"); done
  # In the build folder of the tests, whose objects it uses.
  CMAKE_BUILD_PARALLEL_LEVEL=$(nproc) _PYTHON_HOST_PLATFORM=linux-aarch64 SETUPTOOLS_EXT_SUFFIX=.cpython-311-$triple.so \
    log_of "$build/wheel.log" $python -m pip wheel --verbose --disable-pip-version-check --no-build-isolation --no-deps \
    --wheel-dir "$build/wheel" -C "build-dir=$build" "${options[@]}" .
  log_of "$build/wheel.log" $python -m pip install --disable-pip-version-check --target "$build/wheel/site" --upgrade \
    --only-binary=:all: --python-version 3.11 --platform manylinux_2_28_aarch64 --platform manylinux_2_17_aarch64 \
    --platform linux_aarch64 "$build"/wheel/*.whl
  grep -q 'class Plan' "$build/wheel/site/tessera/_core.pyi" || { echo "check-aarch64: the wheel has no type stub _core.pyi" >&2; exit 1; }
  "${emulate[@]}" -E "PYTHONHOME=$root/usr" -E "PYTHONPATH=$PWD/$build/wheel/site" "$root/usr/bin/python3.11" - <<'PYTHON'
import platform

import numpy as np
import tessera

rng = np.random.default_rng(0)
q, k, v = (rng.standard_normal((1, heads, 200, 48)).astype(np.float32) for heads in (4, 2, 2))
scores = np.einsum("bhqd,bhkd->bhqk", q, k.repeat(2, 1), dtype=np.float64) / np.sqrt(48)
scores[..., np.triu(np.ones((200, 200), bool), 1)] = -np.inf
weights = np.exp(scores - scores.max(-1, keepdims=True))
expected = weights / weights.sum(-1, keepdims=True) @ v.repeat(2, 1)
for isa in tessera.supported_isas():
    error = np.abs(tessera.attention(q, k, v, causal=True, isa=isa) - expected).max()
    assert error < 1e-5, (isa, error)
    print(f"wheel on {platform.machine()}: attention on {isa}, largest error {error:.1e}")
PYTHON
  du -h "$build"/wheel/*.whl | sed 's|\t.*/| |'
fi
