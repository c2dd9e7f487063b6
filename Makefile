# `make demo` and `make test` do everything that they need first, system packages included.

VENV := $(CURDIR)/.venv
BIN := $(VENV)/bin
export VIRTUAL_ENV := $(VENV)
export PATH := $(BIN):$(PATH)

READY := $(VENV)/.ready
BUILT := build/.module
CPP := $(shell find csrc cmake -type f) CMakeLists.txt
CPP_FORMATTED = $(shell find csrc tests/cpp tests/fuzz tests/soak bench -name '*.h' -o -name '*.cc' -o -name '*.cu')
# All but what needs the headers of CUDA or of Python.
CPP_TIDIED = $(filter-out csrc/bindings/% csrc/device/cuda_%,$(shell find csrc -name '*.cc'))
# The thread-safety analysis: see csrc/util/mutex.h. GCC 12's own headers use what is deprecated.
TIDY_FLAGS = -std=c++20 -Icsrc -Wall -Wextra -Wno-deprecated-declarations -Wthread-safety \
	-Wthread-safety-beta $(if $(wildcard /usr/include/liburing.h),-DWSM_HAVE_LIBURING=1)
# Older ThreadSanitizers cannot run where the kernel spreads addresses wider than they expect.
FIXED_ADDRESSES := $(shell setarch -R true 2>/dev/null && echo setarch -R)

.NOTPARALLEL:
# Of `make hostile` and `make fuzz`.
COUNT ?= 100000
SEED ?= 1
TARGET ?= plan
RUNS ?= 1000000
FUZZ_CXX ?= $(firstword $(shell for v in '' -19 -18 -17 -16 -15; do command -v clang++$$v; done; true))

.PHONY: help setup build test test-cpp test-py test-gpu cycles interrupts soak hostile fuzz compatibility sweep bench \
	demo lint format clean

help:
	@echo "make demo      stream a small model under budgets smaller than it, and check the result"
	@echo "make test      lint, and all tests: C++ plain, under ASan+UBSan and TSan; Python"
	@echo "make setup     the system packages that are missing, and .venv"
	@echo "make build     the module, installed in .venv so that edits of wsm_ext take effect"
	@echo "make test-cpp | test-py | lint | format"
	@echo "make test-gpu  the tests that need a CUDA GPU; fails without one"
	@echo "make cycles CYCLES=1000  open, use and close a stream so often; nothing may be left behind"
	@echo "make interrupts INTERRUPTS=50000  Ctrl-C at so many random moments of each kind of work"
	@echo "make soak SECONDS=3600 [SANITIZER=asan|tsan]  random passes over faulty storage for so long"
	@echo "make compatibility  compare all families of transformers, and write docs/compatibility.md"
	@echo "make sweep DEVICE=cpu  a tiny model of every model type of the installed transformers"
	@echo "make hostile COUNT=100000 SEED=1  spoiled checkpoints, judged against safetensors"
	@echo "make fuzz TARGET=plan RUNS=1000000  a target of tests/fuzz under libFuzzer (needs clang)"
	@echo "make bench     the benchmarks that this machine can run; results go to build/bench"

$(READY): requirements-dev.txt requirements-dev-nodeps.txt scripts/setup.sh
	scripts/setup.sh
	@touch $@

$(BUILT): $(READY) $(CPP) setup.py pyproject.toml
	WSM_BUILD_DIR=build/python $(BIN)/python -m pip install -q --no-build-isolation --no-deps -e .
	@cat build/python/wsm_summary.txt
	@touch $@

setup: $(READY)
build: $(BUILT)

demo: build
	$(BIN)/wsm demo

test: lint build test-cpp test-py

test-cpp: test-cpp-debug test-cpp-asan test-cpp-tsan

test-cpp-%: $(READY)
	cmake --preset $* --log-level=WARNING
	cmake --build --preset $*
	$(if $(filter tsan,$*),$(FIXED_ADDRESSES)) ctest --preset $*

# A worker a core, each on one thread: a model as small as the tests' gains nothing by more.
test-py: export OMP_NUM_THREADS := 1
test-py: build
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

test-gpu: export WSM_REQUIRE_GPU := 1
test-gpu: build test-cpp-debug
	$(BIN)/python -m pytest -m gpu

CYCLES ?= 1000
cycles: export WSM_TEST_CYCLES := $(CYCLES)
cycles: build
	$(BIN)/python -m pytest -o timeout=36000 tests/test_processes.py -k nothing_is_left

INTERRUPTS ?= 50000
interrupts: build
	$(BIN)/python tests/interrupts.py --count $(INTERRUPTS) --seed $(SEED)

SECONDS ?= 3600
SOAK_PRESET = $(or $(SANITIZER),release)

# Less of what is freed is kept: thousands of threads come and go, and each would keep its own.
soak: export ASAN_OPTIONS := quarantine_size_mb=32:thread_local_quarantine_size_kb=16
soak: export TSAN_OPTIONS := halt_on_error=1 second_deadlock_stack=1
soak: $(READY)
	cmake --preset $(SOAK_PRESET) --log-level=WARNING
	cmake --build --preset $(SOAK_PRESET) --target wsm_soak
	$(if $(filter tsan,$(SANITIZER)),$(FIXED_ADDRESSES)) build/$(SOAK_PRESET)/tests/soak/wsm_soak $(SECONDS)

compatibility: build
	$(BIN)/python tests/compatibility.py

DEVICE ?= cpu
sweep: export OMP_NUM_THREADS := 1
sweep: build
	mkdir -p build/sweep
	$(BIN)/python tests/sweep.py --device $(DEVICE) --json build/sweep/$(DEVICE).json

hostile: build
	$(BIN)/python tests/hostile.py --count $(COUNT) --seed $(SEED)
	$(BIN)/python tests/hostile_large.py

fuzz: $(READY)
	@test -n "$(FUZZ_CXX)" || { echo "make fuzz needs clang with libFuzzer (Debian: clang-16" \
		"libclang-rt-16-dev); name it by FUZZ_CXX=" >&2; exit 1; }
	cmake --preset fuzz --log-level=WARNING -DCMAKE_CXX_COMPILER=$(FUZZ_CXX)
	cmake --build --preset fuzz --target wsm_fuzz_$(TARGET)
	mkdir -p build/fuzz/corpus/$(TARGET)
	$(BIN)/python tests/fuzz/corpus.py unpack $(TARGET) build/fuzz/seeds/$(TARGET)
	build/fuzz/tests/fuzz/wsm_fuzz_$(TARGET) -runs=$(RUNS) -max_len=250 -timeout=20 -print_final_stats=1 \
		-artifact_prefix=build/fuzz/ build/fuzz/corpus/$(TARGET) build/fuzz/seeds/$(TARGET)

bench: build
	cmake --preset release
	cmake --build --preset release
	$(BIN)/python bench/local.py --programs build/release/bench --out build/bench

lint: $(READY)
	ruff check .
	ruff format --check .
	mypy
	clang-format --dry-run --Werror $(CPP_FORMATTED)
	echo $(CPP_TIDIED) | xargs -P $$(nproc) -n 1 sh -c \
		'clang-tidy --quiet "$$@" -- $(TIDY_FLAGS)' tidy

format: $(READY)
	ruff check --fix .
	ruff format .
	clang-format -i $(CPP_FORMATTED)

clean:
	rm -rf build wsm_ext/_engine*.so
