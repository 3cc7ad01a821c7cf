# make serve   install into .venv when needed, then serve (PORT, MODEL, EXTRA, ARGS)
# make test    install with the test tools, then run the tests (ARGS)
# make lint    ruff, mypy --strict and the import contracts
# make sanitize  the native kernels' tests under the address, undefined-behaviour and thread sanitizers
# make clean   remove .venv and build output

PORT ?= 8000
MODEL ?=
ARGS ?=
# The MLX backend on Linux: cpu, cuda12 or cuda13. macOS brings its own and installs the same extra as nothing.
EXTRA ?= cpu

VENV := .venv
BIN := $(VENV)/bin
# A new package must be installed to be found; a new module in a known package need not.
SOURCES := pyproject.toml CMakeLists.txt $(wildcard kernels/turboquant_kv/native/*.c kernels/turboquant_kv/native/src/*) \
	$(shell find kernels server -name __init__.py)
# The backend is part of the stamp's name: two of them cannot share a virtual environment.
BASE_STAMP := $(VENV)/.installed-$(EXTRA)
DEV_STAMP := $(VENV)/.installed-$(EXTRA)-dev

.PHONY: serve test lint sanitize clean

serve: $(BASE_STAMP)
	@exec $(BIN)/turboserve serve $(MODEL) --port $(PORT) $(ARGS)

test: $(DEV_STAMP)
	@$(BIN)/python -m pytest $(ARGS)

lint: $(DEV_STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Python itself is not instrumented, so the runtimes are preloaded; it never frees everything, so leaks are not counted.
SANITIZED := build/sanitize
sanitize: $(DEV_STAMP)
	$(BIN)/python -m pip install --quiet nanobind cmake ninja
	PATH="$(abspath $(BIN)):$$PATH" cmake -S . -B $(SANITIZED) -G Ninja -DTURBOQUANT_SANITIZE=ON -DPython_EXECUTABLE="$(abspath $(BIN))/python"
	PATH="$(abspath $(BIN)):$$PATH" cmake --build $(SANITIZED) --target _kernels
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so.6)" \
	ASAN_OPTIONS=detect_leaks=0 TURBOQUANT_TEST_KERNELS="$(abspath $(SANITIZED))" \
		$(BIN)/python -m pytest tests/turboquant_kv/native $(ARGS)
	$(CXX) -std=c++17 -O1 -g -fsanitize=thread -Ikernels/turboquant_kv/native/src tests/turboquant_kv/native/pool_test.cpp \
		kernels/turboquant_kv/native/src/pool.cpp -pthread -o $(SANITIZED)/pool_test
	$(SANITIZED)/pool_test

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache

$(BASE_STAMP): $(SOURCES)
	@.ci/install $(VENV) $(EXTRA)
	@touch $@

$(DEV_STAMP): $(SOURCES)
	@.ci/install $(VENV) $(EXTRA) dev
	@touch $(BASE_STAMP) $@
