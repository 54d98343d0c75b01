#!/bin/bash
# docs/methods.md and docs/models.md from the code, and the C++ reference as HTML into build/docs. usage: scripts/make-docs.sh BUILD_DIR
set -euo pipefail
"$1"/bin/tessera methods --markdown >docs/methods.md
"$1"/bin/tessera models --markdown >docs/models.md
mkdir -p build/docs
doxygen docs/Doxyfile
echo "reference: build/docs/html/index.html; methods: docs/methods.md"
