#!/bin/bash
# clang-format on every C++ source; clang-tidy on the sources that differ from a revision, or on all.
# usage: scripts/lint.sh BUILD_DIR [REVISION]       BUILD_DIR holds compile_commands.json
set -euo pipefail
build=$1
since=${2:-}

mapfile -t sources < <(git ls-files '*.cpp' '*.h')
clang-format --dry-run --Werror "${sources[@]}"
echo "clang-format: ${#sources[@]} files are formatted"

changed() { # every source, or those that differ from the revision; a changed header is seen through one that includes it
  if [[ -z $since ]]; then
    git ls-files '*.cpp'
    return
  fi
  git diff --name-only --diff-filter=d "$since" -- '*.cpp'
  git diff --name-only --diff-filter=d "$since" -- '*.h' | while read -r header; do
    git grep -lF "${header#*/}\"" -- '*.cpp' | head -n 1 || true
  done
}
# Only files that the build compiles: examples are built on their own.
mapfile -t units < <(changed | sort -u | while read -r file; do
  if grep -qF "\"$PWD/$file\"" "$build/compile_commands.json"; then echo "$file"; fi
done)
[[ ${#units[@]} -gt 0 ]] || exit 0
printf '%s\n' "${units[@]}" | xargs --max-args=1 --max-procs="$(nproc)" \
  clang-tidy -p "$build" --quiet --extra-arg=-Wno-unknown-warning-option 2> >(grep -v 'warnings generated\|Suppressed\|Use -header-filter' >&2)
echo "clang-tidy: ${#units[@]} files are clean"
