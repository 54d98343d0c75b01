#!/bin/bash
# Installs a build as a shared and as a static library, and builds and runs the C++ example against each: with
# find_package, and with a pkg-config line. usage: scripts/check-install.sh BUILD_DIR
set -euo pipefail
build=$(realpath "$1")

check() { # shared|static, its value of BUILD_SHARED_LIBS; the objects are the same, so that only the link is new
  local prefix=$build/install-$1 line
  rm -rf "$prefix"
  cmake -S . -B "$build" -DBUILD_SHARED_LIBS="$2" >/dev/null
  cmake --build "$build" --target tessera tessera_cli >/dev/null
  cmake --install "$build" --prefix "$prefix" >/dev/null

  cmake -S examples/cpp -B "$prefix/example" -G Ninja -DCMAKE_BUILD_TYPE=Release -DCMAKE_PREFIX_PATH="$prefix" >/dev/null
  cmake --build "$prefix/example" >/dev/null
  line=$("$prefix/example/sparse_attention" | tail -n 1)
  echo "$1, find_package: $line"

  PKG_CONFIG_PATH=$(dirname "$(find "$prefix" -name tessera.pc)")
  export PKG_CONFIG_PATH
  # shellcheck disable=SC2046
  g++ -std=c++20 -O2 examples/cpp/main.cpp -o "$prefix/with-pkg-config" $(pkg-config --cflags --libs tessera) \
    -Wl,-rpath,"$(pkg-config --variable=libdir tessera)"
  line=$("$prefix/with-pkg-config" streaming:n_local=384 | tail -n 1)
  echo "$1, pkg-config $(pkg-config --modversion tessera): $line"
  "$prefix/bin/tessera" methods >/dev/null
}
check static OFF
check shared ON
