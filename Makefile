# Works as the first command on a fresh clone: every target makes .venv when it is missing or outdated.
.POSIX:
PYTHON ?= python3
VENV = .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed
# Threads of arithmetic in each test process; three share two cores, as a test often waits for a process of its own.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest

help: ## Show this list (default)
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)$$/\1|\2/p' Makefile | awk -F'|' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: $(STAMP) ## Create .venv and install everything; reuses it when nothing changed

$(STAMP): requirements.txt requirements-dev.txt requirements-sweeps.txt pyproject.toml
	@command -v $(PYTHON) >/dev/null 2>&1 || { echo "No '$(PYTHON)' found. Install Python 3.10 or later, or name one: make PYTHON=/path/to/python3.11 setup" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "SegFit needs Python 3.10 or later; '$(PYTHON)' is $$($(PYTHON) -V 2>&1). Name another: make PYTHON=python3.11 setup" >&2; exit 2; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "'$(PYTHON)' lacks the venv module. On Debian and Ubuntu: sudo apt install python3-venv" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $(STAMP)

demo: $(STAMP) ## Train on built-in data, evaluate on held-out data (minutes, offline)
	@set -e; run=outputs/demo-$$(date +%Y%m%d-%H%M%S)-$$$$; \
	$(BIN)/python train.py experiment=demo hydra.run.dir=$$run; \
	$(BIN)/python evaluate.py run=$$run split=test; \
	echo; echo "To see curves and pictures:  $(BIN)/tensorboard --logdir $$run"

test: $(STAMP) ## Run the tests that take seconds
	$(PYTEST) -n 3 --dist loadfile -m "not slow and not gpu"

test-all: $(STAMP) ## Run every test but those that need a GPU
	$(PYTEST) -n 3 --dist loadfile -m "not gpu"

test-min: ## Run the tests that take seconds with the oldest release of every range, in .venv-min
	$(PYTHON) -m venv $(VENV)-min
	$(VENV)-min/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-min.txt
	OMP_NUM_THREADS=1 $(VENV)-min/bin/python -m pytest -n 3 --dist loadfile -m "not slow and not gpu"

test-gpu: $(STAMP) ## Run the tests that need a CUDA device
	$(PYTEST) -m gpu

prove: $(STAMP) ## Measure on this CUDA card what no CPU can show, in half an hour
	$(BIN)/python docs/benchmarks/prove.py right || true # what failed is in outputs/prove.json
	$(BIN)/python docs/benchmarks/prove.py memory || true
	$(BIN)/python docs/benchmarks/prove.py speed

soak: $(STAMP) ## Train under random faults for ten minutes; must end with the weights of a calm training
	$(BIN)/python -m tests.soak

peers-setup: $(STAMP) ## Install those whom docs/benchmarks/peers.py measures against
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-peers.txt

lint: $(STAMP) ## Check format, style and types
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

format: $(STAMP) ## Format and fix what can be fixed
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

.PHONY: help setup demo test test-all test-min test-gpu prove soak peers-setup lint format
