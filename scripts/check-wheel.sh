#!/bin/bash
# Builds the wheel and uses it in a fresh environment that has NumPy and nothing else on its PATH: no compiler, and no
# library but those of the wheel, the C library and libstdc++.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export CXX=${CXX:-c++} CMAKE_BUILD_PARALLEL_LEVEL=${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)}
.venv/bin/pip wheel --quiet --disable-pip-version-check --no-build-isolation --no-deps --wheel-dir "$folder" .
wheel=$(ls "$folder"/*.whl)
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "$wheel"
module=$(ls "$folder"/venv/lib/python*/site-packages/tessera/_core*.so)
foreign=$(ldd "$module" | awk '/=>/ { print $3 }' | grep -v "^$folder" | grep -vE '/(libc|libm|libdl|libpthread|librt|libstdc\+\+|libgcc_s)\.so' || true)
[[ -z $foreign ]] || { printf 'the wheel needs libraries that it does not carry:\n%s\n' "$foreign"; exit 1; }
cd "$folder"
env --ignore-environment PATH="$folder/venv/bin" python - <<'PYTHON'
import numpy as np
import tessera

rng = np.random.default_rng(0)
q, k, v = (rng.standard_normal((1, heads, 300, 64)).astype(np.float32) for heads in (4, 2, 2))
found = [tessera.attention(q, k, v, "xattention", causal=True, isa=isa) for isa in tessera.supported_isas()]
assert all(np.allclose(o, found[0], atol=1e-5) for o in found)
print("wheel: attention on", ", ".join(tessera.supported_isas()))
PYTHON
du -h "$wheel" | sed 's|\t.*/| |'
