# The usual tasks. `make help` lists them; each installs the Debian packages it needs first (scripts/install-packages.sh).
PRESET ?= release
PREFIX ?= /usr/local
JOBS ?= $(shell nproc)
BUILD := build/$(PRESET)
VENV := .venv

# ccache where there is one: looked for when a recipe runs, since the packages of an earlier one may bring it.
export CMAKE_CXX_COMPILER_LAUNCHER ?= $(shell command -v ccache)
export CCACHE_BASEDIR ?= $(CURDIR)
export CCACHE_NOHASHDIR ?= 1

.PHONY: all help build test python demo bench lint format docs site install packages-% clean
all: build

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z][a-z-]*:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile
	@echo "  PRESET=release|debug|asan|ubsan|tsan|sanitize|fuzz chooses the build (now: $(PRESET)), JOBS=N the processes"

build: packages-build packages-test $(BUILD)/build.ninja ## Build the library, the command line, tests and benchmarks
	@cmake --build --preset $(PRESET) --parallel $(JOBS)

test: build packages-browser $(VENV)/installed ## Run every test: C++, command line, Python integration and training, pages in a browser
	@scripts/run-tests.sh $(PRESET)

python: packages-build packages-test $(VENV)/installed ## Build the Python package into .venv
	@scripts/install-python.sh

demo: packages-build packages-test $(BUILD)/build.ninja ## A long document through a small model, dense and sparse, and a page of pictures
	@cmake --build --preset $(PRESET) --parallel $(JOBS) --target tessera_cli
	@mkdir -p demo
	@$(BUILD)/bin/tessera demo --html demo/index.html

bench: build ## The cases that have a speed target, against it (minutes; keep the machine quiet)
	@python3 benchmarks/targets.py $(BUILD)/bin/tessera

lint: packages-build packages-test packages-lint $(BUILD)/build.ninja ## clang-format and clang-tidy; warnings are errors
	@scripts/lint.sh $(BUILD)

format: packages-lint ## Format the C++ sources in place
	@git ls-files '*.cpp' '*.h' | xargs clang-format -i

docs: packages-docs build ## Reference documentation into build/docs, docs/methods.md from the registry
	@scripts/make-docs.sh $(BUILD)

site: python ## The documentation site with the reference of the Python package, into build/site
	@$(VENV)/bin/mkdocs build --strict --quiet

install: packages-build packages-test ## Install the release library, headers and command line under PREFIX
	@cmake --preset release -DCMAKE_INSTALL_PREFIX=$(PREFIX)
	@cmake --build --preset release --parallel $(JOBS) --target tessera tessera_cli
	@cmake --install build/release --prefix $(PREFIX)

clean: ## Remove what was built
	rm -rf build demo

packages-%:
	@scripts/install-packages.sh $*

$(BUILD)/build.ninja: CMakePresets.json
	@cmake --preset $(PRESET)

$(VENV)/installed: tests/integration/requirements.txt tests/browser/requirements.txt python/tests/requirements.txt training/requirements.txt
	@echo "installing the Python packages of the tests into $(VENV) (once; PyTorch is large)"
	@python3 -m venv $(VENV)
	@$(VENV)/bin/pip install --quiet --disable-pip-version-check -r tests/integration/requirements.txt -r tests/browser/requirements.txt -r python/tests/requirements.txt
	@touch $@
