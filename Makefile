# `make help` lists the targets. They make .venv once and remake it when pyproject.toml or constraints.txt change.
SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON ?= python3
# An extra package index for torch, e.g. https://download.pytorch.org/whl/cpu, where the default one gives a CUDA build.
TORCH_INDEX ?=
# Read by `make demo`: the recipe, further flags of `upspiral run`, and where the run is written.
RECIPE ?= recipes/demo.toml
ARGS ?=
RUN ?= runs/demo
# Read by `make test`: further flags of pytest.
PYTEST_ARGS ?=

BIN := .venv/bin
STAMP := .venv/.upspiral-installed
PIP_INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt

.PHONY: help setup agents model demo test check bench clean

help: ## list these targets
	@awk -F':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv with everything in it

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "error: $(PYTHON) is older than 3.11; give another one: make PYTHON=python3.12" >&2; exit 2; }
	@echo "set-up: making .venv (about 2 GB; takes minutes once)"
	@started=$$SECONDS; set -e; \
	  test -x $(BIN)/python || $(PYTHON) -m venv .venv; \
	  $(PIP_INSTALL) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch==2.13.0; \
	  $(PIP_INSTALL) -e '.[train,ray,deepspeed,megatron,agents,dev]'; \
	  touch $@; \
	  echo "set-up: done in $$((SECONDS - started)) s, .venv is $$(du -sh .venv | cut -f1)"

agents: $(STAMP) ## fetch the agents that runs and tests can start, from npm and PyPI, into the cache
	@$(BIN)/upspiral agent get

model: $(STAMP) ## fetch the default model into the cache (93 MB), which the demo and some tests need
	@$(BIN)/upspiral model get smollm2-135m

demo: model ## train a real model on this machine (about 14 minutes on 2 cores), then write report.html
	@$(BIN)/upspiral run $(RECIPE) --run $(RUN) $(ARGS)

test: $(STAMP) ## run the tests
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(PYTEST_ARGS)

check: $(STAMP) ## lint, formatting, types, import layers, size budgets
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --level error
	$(BIN)/lint-imports
	$(BIN)/python tools/check_budgets.py src

bench: $(STAMP) ## run the quick benchmarks; each prints one JSON line last
	@set -e; for file in benchmarks/first_step.py; do echo "== $$file"; $(BIN)/python $$file; done

clean: ## remove .venv and every cache; runs/ stays
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis .import_linter_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
