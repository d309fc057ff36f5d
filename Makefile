# Granite Switch. `make demo` and `make test` work from a clean clone with Python 3.11 and make.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
OUT := out
SAMPLE := $(OUT)/granite-switch-sample
WORKERS ?= 2
export HF_HUB_OFFLINE ?= 1
export HF_HUB_DISABLE_PROGRESS_BARS ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: setup demo test test-fast check format sample bench bench-full bench-setup clean
.DEFAULT_GOAL := help

help:
	@echo "make demo       compose the sample model, generate with each adapter, show the routing"
	@echo "make test       everything that runs on a CPU here"
	@echo "make test-fast  the part of it that takes under two minutes"
	@echo "make check      format, lint, types, import arrows"
	@echo "make sample     train the sample model and its adapters anew (under an hour)"
	@echo "make bench      the main figures of docs/performance.md (bench-setup: the older project, bench-full: all)"

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

bench: setup
	$(BIN)/python benchmarks/bench.py --quick
	$(BIN)/python benchmarks/page.py

bench-full: setup
	$(BIN)/python benchmarks/bench.py
	$(BIN)/python benchmarks/page.py

bench-setup: .venv-old/.stamp

.venv-old/.stamp:
	$(PYTHON) -m venv .venv-old
	.venv-old/bin/pip install --quiet torch==2.13.0
	.venv-old/bin/pip install --quiet torch==2.13.0 'granite-switch[compose]==0.1.1'
	touch $@

clean:
	rm -rf $(OUT) build dist
