# Everything from a fresh machine with Python 3.11 or newer: `make demo`, `make test`. A contributor runs `make check`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: help demo test lint check clean
.DEFAULT_GOAL := help

help:
	@echo "make demo   see tightfit keep its word on a small model, offline"
	@echo "make test   the default tests"
	@echo "make lint   format, lint, types, import floors"
	@echo "make check  lint and test: what must pass before a change lands"
	@echo "make clean  remove the environment and all caches"

# torch goes first and by itself, so that its long download is not lost when something after it fails.
$(READY): pyproject.toml constraints.txt hatch_build.py src/tightfit/formats/kernels/table.c
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ printf 'error: tightfit needs Python 3.11 or newer\n\nhint: `make PYTHON=python3.12`\n' >&2; exit 1; }
	@echo "setting up $(VENV); the first time takes minutes" >&2
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

demo: $(READY)
	@$(BIN)/tightfit demo

# Two at a time; files stay together, since their tests share models.
test: $(READY)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(READY)
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/basedpyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports --no-logo
	$(BIN)/python bench/table.py --check

check: lint test

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .import_linter_cache
	find src tests bench scripts docs -name __pycache__ -type d -prune -exec rm -rf {} +
