# SPDX-License-Identifier: LGPL-2.1-or-later
# `make` alone explains itself. Each target installs what it needs first (as root, on Debian 12).
.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help deps demo test test-cluster check format diagrams bench test-all deb clean

BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest
ARGS ?=
IN_CI := -m "not peer and (not cluster or in_ci)"
# Workers take whole modules, the slow ones first. Three where many tests wait, two where guests take the processors.
SHARED := --dist=loadfile --no-loadscope-reorder

help:      ## list the targets
	@grep -hE '^[a-z-]+: .*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

deps:      ## install Debian packages and the virtual environment
	@tools/install-deps

demo: deps ## three guests, one fences another; about a minute
	@$(BIN)/python -m tests.rig.demo $(ARGS)

test: deps ## unit, integration and system tests, a node of a cluster that panics (ARGS="-k name" narrows)
ifeq ($(ARGS),)
	$(PYTEST) $(IN_CI) $(SHARED) --numprocesses=3 tests/unit tests/integration tests/fuzz
	$(PYTEST) $(IN_CI) $(SHARED) --numprocesses=2 tests/system tests/cluster
else
	$(PYTEST) $(IN_CI) $(ARGS) tests/unit tests/integration tests/fuzz tests/system tests/cluster
endif

test-cluster: deps ## two guests, a real Pacemaker cluster; nodes break and are fenced (ARGS="-k panics" narrows)
	$(PYTEST) -m cluster $(ARGS) tests/cluster

check: deps ## format, lint, types (mypy and pyright, strict), import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pyright --pythonpath $(BIN)/python  # so that it sees the system packages too
	$(BIN)/lint-imports

format: deps ## write what `check` wants of the format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

diagrams: deps ## draw docs/state-machines.md and fill docs/protocol.md's tables from the code
	PYTHONPATH=.:host:guest:agents $(BIN)/python docs/make_diagrams.py

bench: deps ## measure; figures with the machine they were measured on
	$(BIN)/python -m benchmarks $(ARGS)

test-all: check ## the checks, every test with its full count, fuzzing; goes on where it stopped (ARGS="soak" narrows)
	$(BIN)/python -m tests.verification $(ARGS)

deb:       ## build the Debian packages into dist/
	@tools/build-deb dist

clean:     ## remove what was built, cached or installed here
	rm -rf .venv .cache build dist *.egg-info .coverage .mypy_cache .ruff_cache .pytest_cache .hypothesis \
		.import_linter_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
