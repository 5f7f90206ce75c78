# Each target sets up what it needs in .venv and is quick the second time. `make help` lists them.
SHELL := /bin/bash
PYTHON ?= python3
TORCH := 2.13.0
WORKERS ?= 2
SECONDS ?= 600
BENCH ?= train_step
COMPILERS ?= g++-11 clang++-14

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
CSRC := $(wildcard csrc/*.cpp csrc/*.h csrc/*.inc)
# What an install is made of: when one of these changes, the next target installs anew.
HASH := $(shell cat pyproject.toml setup.py $(CSRC) | cksum | cut -d' ' -f1)
RUNTIME := .venv/.runtime-$(HASH)
DEV := .venv/.dev-$(HASH)

# One thread for each test process, so that the processes do not fight for the cores. No test reaches for a network.
TEST_ENV := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1

SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=undefined -O1 -g1 -DHANDFUL_EMULATE_AVX_VNNI -DHANDFUL_EMULATE_AMX \
  $(shell grep -q avx512_bf16 /proc/cpuinfo || echo -DHANDFUL_EMULATE_AVX512)
SANITIZED := build/sanitize/handful/_native.abi3.so
# Memory that nobody wrote to is filled with NaN (bytes of 255), so that a result made from it shows.
SANITIZED_ENV = LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
  ASAN_OPTIONS=detect_leaks=0:malloc_fill_byte=255:max_malloc_fill_size=1073741824 \
  UBSAN_OPTIONS=print_stacktrace=1 HANDFUL_NATIVE=$(SANITIZED) $(TEST_ENV)

.PHONY: help demo serve test test-torch soak check sanitize emulate compilers wheel wheel-test bench browser-test clean
.DEFAULT_GOAL := help

help: ## list these targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /make \1\t/' | expand -t 20

demo: $(RUNTIME) ## train the three teams on the default text, then show the table and runs/demo/report.html
	$(BIN)/handful compare --out runs/demo

serve: $(RUNTIME) ## show the page of the newest model under runs/ in the browser: what its routers do, token by token
	$(BIN)/handful serve --open

test: $(DEV) ## run the tests
	$(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) --ignore tests/browser

# As on ARM and macOS: everything through torch.
test-torch: $(DEV) ## run the tests of models, experts, memory and training without the kernels
	HANDFUL_ISA=none $(TEST_ENV) $(BIN)/python -m pytest -q -n $(WORKERS) \
	  tests/test_{attention,balance,cluster,engine,generate,limits,machine,memory,missing,model,moe,padding,prefix_cache,replay,routing_options,transformers}.py \
	  tests/experts/test_{experts,offload,parallel,quantized,remote,selection}.py tests/verify

soak: $(DEV) ## ten minutes of mixed load on a server; its memory must not grow (SECONDS=600)
	HANDFUL_SOAK_SECONDS=$(SECONDS) $(TEST_ENV) $(BIN)/python -m pytest -q -s tests/server/test_soak.py

check: $(DEV) ## lint, check the format, the types and the import tiers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_imports.py

sanitize: $(DEV) $(SANITIZED) ## run the kernels' tests at every level under the address and undefined-behaviour sanitizers; what the CPU lacks is emulated
	$(SANITIZED_ENV) $(BIN)/python -m pytest -q -n $(WORKERS) --capture=sys \
	  tests/experts/test_native.py tests/experts/test_offload.py tests/kernels/test_decode_kernels.py
	for level in avx2 avx_vnni avx512f avx512 amx; do \
	  HANDFUL_ISA=$$level $(SANITIZED_ENV) $(BIN)/python tests/every_operation.py $$level || exit 1; done

# Nothing is linked and little optimised: what a compiler does not know or take, it says without.
compilers: .venv/.torch-$(TORCH) ## compile the extension with the oldest compilers that it is for; COMPILERS="g++-11 clang++-14"
	@for cxx in $(COMPILERS); do echo "== $$($$cxx --version | head -n 1)"; printf '%s\n' csrc/*.cpp | xargs -P 2 -I {} \
	  $$cxx -std=c++17 -O0 -Wall -Wno-psabi -Werror -fPIC -fvisibility=hidden -march=x86-64 -DTORCH_TARGET_VERSION=0x020b000000000000 \
	  -isystem $$(ls -d .venv/lib/python*/site-packages/torch/include) -c {} -o /dev/null || exit 1; done

wheel: $(DEV) ## build dist/handful_moe-*.whl: one for every Python from 3.11 and torch from 2.11, no compiler needed to install it
	rm -rf build/lib* build/bdist* dist
	$(PIP) wheel --no-build-isolation --no-deps -w dist .

# In an environment of its own, in which no compiler is to be found.
wheel-test: wheel ## install that wheel in a new environment and prove its kernels there
	rm -rf build/clean && $(PYTHON) -m venv build/clean
	ls dist/handful_moe-*-cp311-abi3-linux_x86_64.whl
	build/clean/bin/python -m pip --disable-pip-version-check --quiet install torch==$(TORCH) dist/*.whl
	cd build/clean && HANDFUL_ISA=avx2 PATH=/nowhere ./bin/python ../../tests/every_operation.py avx2
	cd build/clean && PATH=/nowhere ./bin/handful doctor --json > doctor.json && grep '"native_error": null' doctor.json

emulate: $(DEV) ## run every kernel on emulated CPUs, one with AVX2 alone and one without; needs qemu-x86_64 (Debian's qemu-user)
	$(TEST_ENV) qemu-x86_64 -cpu Haswell-noTSX $(BIN)/python tests/every_operation.py avx2 2> >(grep -v 'TCG' >&2)
	$(TEST_ENV) qemu-x86_64 -cpu Nehalem $(BIN)/python tests/every_operation.py none 2> >(grep -v 'TCG' >&2)

$(SANITIZED): setup.py $(CSRC) | $(DEV)
	rm -f $@
	HANDFUL_CXXFLAGS='$(SANITIZE)' $(BIN)/python setup.py -q build_ext \
	  --build-lib build/sanitize --build-temp build/sanitize/objects
	test -f $@

bench: $(DEV) ## measure speed beside peers; BENCH="name ..." names files of bench/
	@set -e; for name in $(BENCH); do echo "== bench/$$name.py"; $(BIN)/python bench/$$name.py; done

browser-test: $(DEV) ## run the tests that drive a headless Chromium, which must be installed
	$(TEST_ENV) $(BIN)/python -m pytest tests/browser

clean: ## remove what was built and cached; .venv and runs stay
	rm -rf build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	rm -f handful/_native*.so .venv/.runtime-* .venv/.dev-*
	find handful tests bench -name __pycache__ -prune -exec rm -rf {} +

.venv/.torch-$(TORCH):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Handful needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) --version 2>&1); name another: make PYTHON=python3.12" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) install torch==$(TORCH)
	$(PIP) install 'setuptools>=77' wheel
	touch $@

# torch is there already, so that the extension is built against it and not against a second copy.
$(RUNTIME): .venv/.torch-$(TORCH)
	$(PIP) install --no-build-isolation -e '.[server]'
	rm -f .venv/.runtime-*
	touch $@

$(DEV): .venv/.torch-$(TORCH)
	$(PIP) install --no-build-isolation -e '.[dev]'
	rm -f .venv/.runtime-* .venv/.dev-*
	touch $(RUNTIME) $@
