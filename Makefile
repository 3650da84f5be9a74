# Needs Python 3.11, pip and make; everything else goes into .venv.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN = .venv/bin
export OMP_NUM_THREADS ?= 1

.PHONY: install train test test-unit check lint bench
install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

# The main job: a LongNet on the source of Python's standard library, sequence-parallel over two processes.
train: install
	$(BIN)/torchrun --standalone --nproc-per-node 2 -m longnet_dist train

test: install
	$(BIN)/pytest

test-unit: install
	$(BIN)/pytest tests/unit longnet_dist

check: lint test

lint: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

# Measure alone: anything else on the machine shows.
bench: install
	OMP_NUM_THREADS=2 $(BIN)/python benchmarks/attention.py
	$(BIN)/python benchmarks/ranks.py
