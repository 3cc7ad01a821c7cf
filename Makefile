# make serve   install into .venv when needed, then serve (PORT, MODEL, EXTRA, LEVELS, ARGS)
# make test    install with the test tools, then run the tests (ARGS; JOBS=0 in one process)
# make clients run foreign clients, each in an environment of its own, against a server (ARGS="--only llm" one of them)
# make lint    ruff, mypy --strict and the import contracts
# make sanitize  the native kernels' tests under the address, undefined-behaviour and thread sanitizers
# make emulate   the NEON kernels against the portable ones under qemu (Debian: g++-aarch64-linux-gnu, qemu-user)
# make metal   the GPU kernels' tests and benchmarks on this machine, into build/metal/report.md (MODEL)
# make docs    the documentation as a site, into build/site; a broken link fails
# make clean   remove .venv and build output

PORT ?= 8000
MODEL ?=
ARGS ?=
# Processes that run tests: one for each core that may be used, but at most four, for each may load models.
JOBS ?= logical
# The MLX backend on Linux: cpu, cuda12 or cuda13. macOS brings its own and installs the same extra as nothing.
EXTRA ?= cpu
# For whom `make serve` builds CPU kernels: native, this machine alone, or all; what runs tests always has all.
LEVELS ?= native

VENV := .venv
BIN := $(VENV)/bin
# A new package must be installed to be found; a new module in a known package need not.
SOURCES := pyproject.toml CMakeLists.txt $(wildcard kernels/turboquant_kv/native/*.c kernels/turboquant_kv/native/src/*) \
	$(shell find kernels server -name __init__.py)
# The backend is part of the stamp's name: two of them cannot share a virtual environment.
BASE_STAMP := $(VENV)/.installed-$(EXTRA)
DEV_STAMP := $(VENV)/.installed-$(EXTRA)-dev

.PHONY: serve test clients lint sanitize emulate metal docs clean

serve: $(BASE_STAMP)
	@exec $(BIN)/turboserve serve $(MODEL) --port $(PORT) $(ARGS)

# Whole files, in the usual order: what a file's tests share is made once, and the long files are not the last.
SPREAD := --numprocesses=$(JOBS) --maxprocesses=4 --dist=loadfile --no-loadscope-reorder
test: $(DEV_STAMP)
	@$(BIN)/python -m pytest $(SPREAD) $(ARGS)

clients: $(DEV_STAMP)
	@$(BIN)/python -m tests.clients.run $(ARGS)

lint: $(DEV_STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Python itself is not instrumented, so the runtimes are preloaded; it never frees everything, so leaks are not counted.
# Only Python's own output is captured: a sanitizer's report would be lost with the process it ends.
SANITIZED := build/sanitize
NATIVE_TESTS := tests/turboquant_kv/native
NATIVE_SOURCES := kernels/turboquant_kv/native/src
sanitize: $(DEV_STAMP)
	$(BIN)/python -m pip install --quiet nanobind cmake ninja
	PATH="$(abspath $(BIN)):$$PATH" cmake -S . -B $(SANITIZED) -G Ninja -DTURBOQUANT_SANITIZE=ON -DPython_EXECUTABLE="$(abspath $(BIN))/python"
	PATH="$(abspath $(BIN)):$$PATH" cmake --build $(SANITIZED) --target _kernels
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so.6)" \
	ASAN_OPTIONS=detect_leaks=0 TURBOQUANT_TEST_KERNELS="$(abspath $(SANITIZED))" \
		$(BIN)/python -m pytest --capture=sys $(NATIVE_TESTS) $(ARGS)
	$(CXX) -std=c++17 -O1 -g -fsanitize=thread -I$(NATIVE_SOURCES) $(NATIVE_TESTS)/pool_test.cpp $(NATIVE_SOURCES)/pool.cpp \
		-pthread -o $(SANITIZED)/pool_test
	$(SANITIZED)/pool_test

EMULATED := build/emulate
ARM_CXX := aarch64-linux-gnu-g++ -std=c++17 -O2 -static -march=armv8.2-a+dotprod+fp16 -I$(NATIVE_SOURCES)
emulate:
	mkdir -p $(EMULATED)
	$(ARM_CXX) -DLEVEL='"isa_neon.h"' $(NATIVE_TESTS)/lookup_test.cpp -o $(EMULATED)/lookup_test
	qemu-aarch64 $(EMULATED)/lookup_test
	$(ARM_CXX) $(NATIVE_TESTS)/levels_test.cpp $(NATIVE_SOURCES)/dispatch.cpp $(wildcard $(NATIVE_SOURCES)/kernels_*.cpp) \
		-o $(EMULATED)/levels_test
	qemu-aarch64 $(EMULATED)/levels_test

metal: $(DEV_STAMP)
	@MODEL="$(MODEL)" .ci/metal $(VENV) build/metal

# An environment of its own: the site needs nothing of the server, and the server nothing of the site.
DOCS_VENV := build/docs-venv
docs: $(DOCS_VENV)/.installed
	@NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --quiet --strict --config-file config/mkdocs.yml

$(DOCS_VENV)/.installed: pyproject.toml
	@.ci/install $(DOCS_VENV) docs
	@touch $@

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache

$(BASE_STAMP): $(SOURCES)
	@LEVELS=$(LEVELS) .ci/install $(VENV) $(EXTRA)
	@touch $@

$(DEV_STAMP): $(SOURCES)
	@.ci/install $(VENV) $(EXTRA) dev
	@touch $(BASE_STAMP) $@
