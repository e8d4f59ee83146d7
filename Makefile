# Everything a developer runs. `make` alone prints this list.
#
#   make demo PYTHON=python3.12                                      another Python (3.11 or newer)
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu       torch without CUDA on Linux

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
TORCH_INDEX ?=
BIN := .venv/bin
STAMP := .venv/.installed
SETUP_LOG := .venv/setup.log
# Test processes: one a core, four at most (1.5 GB each). Each uses one thread (tests/conftest.py).
WORKERS ?= auto --maxprocesses=4
# Floor of `make coverage`, in percent: 97.4 on 2026-11-30, less 3 for the task families whose tests skip
# without fetched datasets, and a margin for code that only some processors reach.
COVERAGE ?= 92

.PHONY: help setup demo test check docs format slow gpu gpu-run bench status coverage dist binary clean

help: ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv and install what constraints.txt pins; instant when up to date

# What venv and pip print goes to the log; a failure is one sentence. torch goes first and without its
# dependencies: an index that holds only torch need not hold the exact versions that constraints.txt
# pins for the rest.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo "setup: $(PYTHON) is missing or older than Python 3.11; name another: make setup PYTHON=python3.12"; exit 1; }
	@echo "setup: installing into .venv, several minutes the first time; log: $(SETUP_LOG)"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
		output=$$($(PYTHON) -m venv --clear .venv 2>&1) || { mkdir -p .venv; echo "$$output" >$(SETUP_LOG); \
		echo "setup: $(PYTHON) cannot make a virtual environment; on Debian or Ubuntu, apt-get install python3-venv; log: $(SETUP_LOG)"; exit 1; }; }
	@: >$(SETUP_LOG)
	@$(call pip_install,$(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) --no-deps -c constraints.txt torch)
	@$(call pip_install,-c constraints.txt -e '.[dev]')
	@touch $(STAMP)
	@echo "setup: done; commands are .venv/bin/qwen2vl and so on, or, after 'source .venv/bin/activate', qwen2vl"

define pip_install
$(BIN)/python -m pip install --disable-pip-version-check $(1) >>$(SETUP_LOG) 2>&1 || { \
	if grep -qE '$(NO_NETWORK)' $(SETUP_LOG); then \
		echo "setup: pip cannot reach a package index; check the network, or pip's proxy and index settings, and repeat; log: $(SETUP_LOG)"; \
	else \
		echo "setup: pip failed ($$(grep -m 1 '^ERROR' $(SETUP_LOG) || tail -n 1 $(SETUP_LOG))); resolve that and repeat; log: $(SETUP_LOG)"; \
	fi; exit 1; }
endef
NO_NETWORK := NewConnectionError|NameResolutionError|ConnectTimeout|ReadTimeout|Read timed out|ProxyError|Connection (refused|reset|aborted|broken)

demo: setup ## ask the embedded model real questions about pictures and a clip
	@$(BIN)/qwen2vl demo

test: setup ## the fast tests: CPU, offline
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --durations=10 -rfEs

check: setup ## lint, format, import contract, types, spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright
	$(BIN)/codespell

docs: setup ## build the documentation site into site/, strictly; to look at it: zensical serve
	$(BIN)/python -m zensical build --strict --clean
	$(BIN)/python -m dev.external_resources site

format: setup ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

coverage: setup ## the fast tests with coverage; fails below the floor
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -rfEs --cov --cov-report=term --cov-fail-under=$(COVERAGE)

status: setup ## the fast tests; if they pass at a clean commit, write it into docs/status.md
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --write-status 'fast set (`make test`)'

dist: setup ## build wheel and sdist, install the wheel into a fresh environment, and ask nano there
	rm -rf dist build/wheel-check
	$(BIN)/python -m build --no-isolation >>$(SETUP_LOG) 2>&1
	$(BIN)/python -m venv build/wheel-check
	build/wheel-check/bin/python -m pip install -q --disable-pip-version-check $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) --no-deps -c constraints.txt torch 2>>$(SETUP_LOG)
	build/wheel-check/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt dist/*.whl 2>>$(SETUP_LOG)
	cd build/wheel-check && ./bin/qwen2vl demo -o demo && ./bin/qwen2vl ask --image demo/text_1.png "What does it say?"

binary: setup ## a wheel for this platform, with the CPU kernels compiled: make binary PLATFORM=manylinux_2_34_x86_64
	$(BIN)/python -m dev.binary_package $(if $(PLATFORM),--platform $(PLATFORM))

slow: setup ## the tests that take minutes or gigabytes
	$(BIN)/python -m pytest -m slow --durations=10

gpu: setup ## the tests that need a CUDA device; they skip where there is none
	$(BIN)/python -m pytest -m gpu -rs --durations=10

gpu-run: ## with the system's Python, offline, 8 minutes a part: make gpu-run PART=check|train OUT=out/gpu
	$(PYTHON) -m dev.gpu_run $(or $(OUT),out/gpu) --part $(or $(PART),check) $(ARGS)

bench: setup ## run one benchmark: make bench SCRIPT=benchmarks/NAME.py; without SCRIPT, list them
	$(if $(SCRIPT),$(BIN)/python $(SCRIPT),@ls benchmarks/*.py 2>/dev/null || echo "benchmarks/ holds no script yet")

clean: ## remove caches and build outputs; .venv stays
	rm -rf build dist site *.egg-info .cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find qwen2vl tests examples benchmarks dev -name __pycache__ -type d -prune -exec rm -rf {} +
