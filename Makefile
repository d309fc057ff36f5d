# Granite Switch. `make demo` and `make test` work from a clean clone with Python 3.11 and make.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
OUT := out
SAMPLE := $(OUT)/granite-switch-sample
WORKERS ?= 2
export HF_HUB_OFFLINE ?= 1
export HF_HUB_DISABLE_PROGRESS_BARS ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: setup demo test test-fast check format sample bench clean
.DEFAULT_GOAL := help

help:
	@echo "make demo       compose the sample model, generate with each adapter, show the routing"
	@echo "make test       everything that runs on a CPU here"
	@echo "make test-fast  the part of it that takes under two minutes"
	@echo "make check      format, lint, types, import arrows"
	@echo "make sample     train the sample model and its adapters anew (under an hour)"

setup: .venv/.stamp

.venv/.stamp: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup
	$(BIN)/python examples/demo.py --output $(SAMPLE)

test: setup
	$(BIN)/python -m pytest tests -n $(WORKERS) -q

test-fast: setup
	$(BIN)/python -m pytest tests -n $(WORKERS) -q -m "not slow"

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy src/granite_switch/core src/granite_switch/compose src/granite_switch/cli src/granite_switch/errors.py
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

sample: setup
	$(BIN)/python sample/train.py

clean:
	rm -rf $(OUT) build dist
