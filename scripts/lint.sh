#!/bin/bash
# clang-format on every C++ source; clang-tidy on the sources that differ from a revision, or on all.
# usage: scripts/lint.sh BUILD_DIR [REVISION]       BUILD_DIR holds compile_commands.json
set -euo pipefail
build=$1
since=${2:-}

mapfile -t sources < <(git ls-files '*.cpp' '*.h')
clang-format --dry-run --Werror "${sources[@]}"
echo "clang-format: ${#sources[@]} files are formatted"

seen_through() { # header: a source that includes it, be it by way of another header
  local source
  source=$(git grep -lF "\"${1#*/}\"" -- '*.cpp' | head -n 1 || true)
  if [[ -n $source ]]; then
    echo "$source"
    return
  fi
  git grep -lF "\"${1#*/}\"" -- '*.h' | head -n 1 | while read -r header; do seen_through "$header"; done || true
}
changed() { # every source, or those that differ from the revision; a changed header is seen through one that includes it
  if [[ -z $since ]]; then
    git ls-files '*.cpp'
    return
  fi
  git diff --name-only --diff-filter=d "$since" -- '*.cpp'
  git diff --name-only --diff-filter=d "$since" -- '*.h' | while read -r header; do seen_through "$header"; done
}
lint() { # folder with compile_commands.json, pattern of files: only files that this build compiles
  mapfile -t units < <(changed | sort -u | grep -E "$2" | while read -r file; do
    if grep -qF "\"$PWD/$file\"" "$1/compile_commands.json"; then echo "$file"; fi
  done)
  [[ ${#units[@]} -gt 0 ]] || return 0
  printf '%s\n' "${units[@]}" | xargs --max-args=1 --max-procs="$(nproc)" \
    clang-tidy -p "$1" --quiet --extra-arg=-Wno-unknown-warning-option 2> >(grep -v 'warnings generated\|Suppressed\|Use -header-filter' >&2)
  echo "clang-tidy: ${#units[@]} files are clean"
}
lint "$build" .
# The bindings are compiled where the wheel is built (make python).
for wheel in build/cp*-linux_*; do
  if [[ -e $wheel/compile_commands.json ]]; then lint "$wheel" '^python/'; fi
done
