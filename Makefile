# The whole interface for people who work on the code. `make demo` needs only Python 3.11 and a package index.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: demo install test lint fix bench clean
.DEFAULT_GOAL := demo

# The lock is a file of exact versions; the stamps make set-up happen once, and again when what it depends on changes.
$(VENV)/.base: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.base
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(VENV)/.base            ## a guided tour with the shipped model
	$(BIN)/gircse demo

install: $(VENV)/.dev          ## everything for development

test: $(VENV)/.dev             ## the default test run, the real 135M model included
	$(BIN)/python -m pytest

lint: $(VENV)/.dev             ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

fix: $(VENV)/.dev              ## what ruff can mend by itself
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.dev            ## memory of a long run, and a run that is killed ten times
	$(BIN)/python benchmarks/embed_memory.py
	$(BIN)/python benchmarks/embed_kills.py

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis build *.egg-info
