#!/bin/bash
# Installs the Debian packages that a task needs, once: nothing is downloaded when all are there.
# usage: scripts/install-packages.sh build|test|browser|lint|fuzz|docs|cross ...
set -euo pipefail

packages_of() {
  case $1 in
    # ocl-icd-opencl-dev: libdnnl-dev's CMake package asks for OpenCL but only recommends it.
    build) echo g++ cmake ninja-build pkg-config libfmt-dev nlohmann-json3-dev libcli11-dev libdnnl-dev ocl-icd-opencl-dev libpng-dev libpcre2-dev libutf8proc-dev libjs-chart.js ;;
    # ccache: the Python package is made of objects that the C++ build compiled before.
    test) echo ccache libgtest-dev libgmock-dev libbenchmark-dev libsimde-dev python3 python3-dev python3-venv ;;
    browser) echo chromium fonts-dejavu-core ;;
    lint) echo clang-format clang-tidy libomp-dev ;;
    cross) echo g++-aarch64-linux-gnu qemu-user ;;
    fuzz) echo clang libclang-rt-14-dev libomp-dev ;; # also the thread sanitizer
    docs) echo doxygen ;;
    *)
      echo "install-packages: unknown group '$1'; expected build, test, browser, lint, fuzz, docs or cross" >&2
      return 2
      ;;
  esac
}

wanted=()
for group in "$@"; do
  packages=$(packages_of "$group")
  read -ra names <<<"$packages"
  wanted+=("${names[@]}")
done

missing=()
for package in "${wanted[@]}"; do
  [[ $(dpkg-query --show --showformat='${db:Status-Status}' "$package" 2>/dev/null) == installed ]] || missing+=("$package")
done
[[ ${#missing[@]} -eq 0 ]] && exit 0

as_root=()
if [[ $(id -u) -ne 0 ]]; then
  if ! command -v sudo >/dev/null; then
    echo "install-packages: these Debian packages are missing, and there is no sudo to install them: ${missing[*]}" >&2
    exit 1
  fi
  as_root=(sudo)
fi

echo "installing Debian packages: ${missing[*]}"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
apt() { "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 --quiet "$@"; }
install() { apt install --yes --no-install-recommends "${missing[@]}" </dev/null >"$log" 2>&1; }
# A machine without package lists, or with old ones, needs an update first.
if ! install; then
  if ! { apt update </dev/null >"$log" 2>&1 && install; }; then
    tail -n 20 "$log" >&2
    echo "install-packages: apt-get failed" >&2
    exit 1
  fi
fi
