# One entry for people and machines. `make demo` on a fresh machine needs Python >= 3.11 and make, nothing else.
SHELL := /bin/bash
.DEFAULT_GOAL := help

VENV ?= .venv
BIN := $(VENV)/bin
# The interpreter that makes $(VENV): the first of these that exists, or `make PYTHON=/path/to/python install`.
PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3.13 python3 python,$(shell command -v $(p) 2>/dev/null)))
# Where torch comes from, if not from pip's own index: a CPU-only or another CUDA build (`make TORCH_INDEX_URL=... install`).
TORCH_INDEX_URL ?=
# More arguments for didr: `make demo ARGS='--set train.steps=50'`.
ARGS ?=

STAMP := $(VENV)/.installed
TORCH := $(shell grep -m1 '^torch==' requirements.lock)

.PHONY: help demo sweep-demo install fetch-sdxl test test-exports test-nodes tests-with-ray tests-of-learning tests-of-the-rest lint types check-python clean

help: ## this list
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: install ## align the bundled tiny generator with its bundled reward, through Ray and MLflow; results under runs/
	@$(BIN)/didr align --recipe tiny $(ARGS)

sweep-demo: install ## four short trials over beta and K on the bundled world: front, heat map and recommendation under runs/
	@$(BIN)/didr sweep --recipe tiny --space smoke $(ARGS)

install: $(STAMP) ## create .venv from requirements.lock (does nothing when it is up to date)

$(STAMP): requirements.lock pyproject.toml
	@$(MAKE) --no-print-directory check-python
	@test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	@echo "installing into $(VENV): $(TORCH) first, then the lock (minutes; 6 GB with pip's own torch on Linux, which has CUDA; TORCH_INDEX_URL names another)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL)) "$(TORCH)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

fetch-sdxl: install ## what recipe sdxl_1gpu needs, into models/ (about 25 GB): the downloads of docs/sdxl.md; goes on where it stopped
	@grep '^hf download ' docs/sdxl.md | PATH="$(abspath $(BIN)):$$PATH" bash -e

check-python:
	@test -n "$(PYTHON)" || { echo "error: no python found. Install Python 3.11 or newer, or say make PYTHON=/path/to/python" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v >= (3, 11) else "error: %s is Python %d.%d; DIDR needs 3.11 or newer. Install one, or say make PYTHON=/path/to/python3.11" % ((sys.executable,) + v))'
	@"$(PYTHON)" -c 'import ensurepip' 2>/dev/null || test -x $(BIN)/python || { echo "error: $(PYTHON) cannot make environments (no ensurepip). On Debian or Ubuntu: apt install python3-venv" >&2; exit 1; }

test: lint ## lint, format, types and every test: those that start Ray beside the others, which are two halves
	@$(MAKE) --no-print-directory -k -j4 -Otarget tests-with-ray types tests-of-learning tests-of-the-rest

tests-with-ray:
	@$(BIN)/python -m pytest -q -m ray

# Folders of tests that take as long as all others together; a new one is among those others by itself.
LEARNING := $(addprefix tests/,algorithms backbones diffusion drs networks plan train)
# Ray's workers are nice, too: they would starve beside us.
WITHOUT_RAY := nice -n 10 $(BIN)/python -m pytest -q -m 'not ray and not packages and not nodes'

tests-of-learning:
	@$(WITHOUT_RAY) $(LEARNING)

tests-of-the-rest:
	@$(WITHOUT_RAY) $(addprefix --ignore=,$(LEARNING))

test-exports: install ## exports under the oldest diffusers, transformers and peft that their cards name (installs them, temporarily)
	@$(BIN)/python -m pytest -q -m packages

test-nodes: install ## a run whose cluster loses and gets nodes, on four nodes simulated here (some four minutes)
	@$(BIN)/python -m pytest -q -m nodes

lint: install ## ruff: rules and format
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: install ## mypy: strict where the maths and the contracts are
	@$(BIN)/mypy

clean: ## remove the environment and caches (runs/ stays)
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
