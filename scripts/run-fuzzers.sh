#!/bin/bash
# Builds the libFuzzer targets and runs each for some seconds, as many at once as there are processors.
# usage: scripts/run-fuzzers.sh SECONDS
set -euo pipefail
export build=build/fuzz seconds=$1
cmake --preset fuzz >/dev/null
mapfile -t names < <(basename --suffix=.cpp --multiple fuzz/*_fuzzer.cpp)
cmake --build --preset fuzz --target "${names[@]}" >"$build/build.log" || { tail -n 50 "$build/build.log"; exit 1; }

fuzz() { # program; starts from the inputs in fuzz/corpus/<name>, if there are any
  local name log corpora=()
  name=$(basename "$1")
  log=$build/$name.log
  mkdir -p "$build/corpus/$name"
  corpora=("$build/corpus/$name")
  if [[ -d fuzz/corpus/$name ]]; then corpora+=("fuzz/corpus/$name"); fi
  if ! "$1" -max_total_time="$seconds" -timeout=10 -rss_limit_mb=4096 -print_final_stats=1 \
    -artifact_prefix="$build/$name-" "${corpora[@]}" >"$log" 2>&1; then
    tail -n 40 "$log"
    return 1
  fi
  echo "$name: $(awk '/number_of_executed_units/ { print $2 }' "$log") inputs without a fault"
}
export -f fuzz
mapfile -t targets < <(find "$build" -name '*_fuzzer' -type f -executable | sort)
[[ ${#targets[@]} -gt 0 ]] || { echo "no fuzz targets were built"; exit 1; }
# shellcheck disable=SC2016
printf '%s\0' "${targets[@]}" | xargs -0 --max-args=1 --max-procs="$(nproc)" bash -c 'fuzz "$0"'
