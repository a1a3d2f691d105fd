# make demo: decode real prompts with the embedded model; make test: run the tests.
# Both build .venv first. A machine without a GPU gets the versions in constraints.txt.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
OLDEST := .venv-oldest
# With a GPU, pip picks torch's CUDA build and the Triton that goes with it.
PINS := $(if $(shell command -v nvidia-smi),,-c constraints.txt)

.PHONY: demo test test-slow test-oldest lint clean

demo: $(STAMP)
	$(BIN)/python -m dsb_runtime.cli.demo

test: $(STAMP)
	$(BIN)/python -m pytest -n auto

test-slow: $(STAMP)
	$(BIN)/python -m pytest -n auto -m slow

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/python -m pytest -n auto

$(STAMP): setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(PINS) -e ".[test,eval]"
	@touch $@

$(OLDEST)/.installed: setup.py constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --upgrade pip
	$(OLDEST)/bin/python -m pip install --quiet -c constraints-oldest.txt -e ".[test]"
	@touch $@

clean:
	rm -rf $(VENV) $(OLDEST) build *.egg-info .pytest_cache .ruff_cache
