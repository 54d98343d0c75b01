#!/bin/bash
# docs/methods.md from the registry, and the C++ reference as HTML into build/docs. usage: scripts/make-docs.sh BUILD_DIR
set -euo pipefail
"$1"/bin/tessera methods --markdown >docs/methods.md
mkdir -p build/docs
doxygen docs/Doxyfile
echo "reference: build/docs/html/index.html; methods: docs/methods.md"
