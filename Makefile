# Needs Python 3.11, pip and make; everything else goes into .venv.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN = .venv/bin
# Python compiles a module when it is first imported. pip would compile all, which takes longer than unpacking them.
PIP_INSTALL = $(BIN)/pip install --disable-pip-version-check --no-compile
export OMP_NUM_THREADS ?= 1
unexport PYTHONDONTWRITEBYTECODE

.PHONY: install install-train lock train test test-slow test-all test-unit test-gpu check lint bench docs
install: .venv/installed
install-train: .venv/installed-train

# requirements/ pins every release, so pip need not search for versions. It still reads the dependencies of each
# package, because a CUDA build of torch has some that a CPU build does not.
.venv/installed: .venv/installed-train requirements/dev.txt pyproject.toml
	@echo "Installing what development needs (requirements/dev.txt): a minute or two"
	$(PIP_INSTALL) --requirement requirements/dev.txt --editable .
	@touch $@

.venv/installed-train: requirements/train.txt
	@echo "Making .venv and installing what training needs (requirements/train.txt): about half a minute"
	$(PYTHON) -m venv .venv
	$(PIP_INSTALL) --requirement requirements/train.txt
	@touch $@

# Resolve the ranges of pyproject.toml anew, in about a minute, with the release of torch that is tested.
lock:
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check --dry-run --ignore-installed --report .venv/report.json \
		torch==2.13.0 --editable '.[dev]'
	$(BIN)/python requirements/lock.py .venv/report.json

# The main job: a LongNet on the source of Python's standard library, sequence-parallel over two processes.
train: install-train
	@echo "Training: Python and torch start in each of two processes, then each says what it does"
	$(BIN)/torchrun --standalone --nproc-per-node 2 -m longnet_dist train

# Unit and distributed tests, and at least one real job of each launcher and integration.
test: install
	$(BIN)/pytest

# What `make test` leaves out: the longest of the real jobs, but for those that only repeat them in other places.
test-slow: install
	$(BIN)/pytest -m 'slow and not exhaustive'

test-all: install
	$(BIN)/pytest -m ''

test-unit: install
	$(BIN)/pytest tests/unit longnet_dist

# Needs a GPU; a few minutes.
test-gpu: install
	$(BIN)/pytest tests/gpu tests/unit/attention tests/unit/models

check: lint test

lint: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

# Run nothing else on the machine meanwhile, because it would change the results.
bench: install
	OMP_NUM_THREADS=2 $(BIN)/python benchmarks/attention.py
	OMP_NUM_THREADS=2 $(BIN)/python benchmarks/training_step.py
	$(BIN)/python benchmarks/ranks.py

# The documentation site, into site/.
docs: install
	$(BIN)/mkdocs build --strict
