# Every target sets itself up from a bare clone; needs Python 3.11 or newer and make.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PIP_ARGS ?=

.PHONY: setup demo test bench lint format clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt -e ".[eval,dev]"
	touch $@

demo: setup
	$(BIN)/python docs/examples/demo.py

test: setup
	$(BIN)/python -m pytest

bench: setup
	OMP_NUM_THREADS=1 $(BIN)/python docs/benchmarks/performance.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info
