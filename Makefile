# make demo: decode real prompts with the embedded models; make test: run the tests.
# Every target builds .venv first. A machine without a GPU gets the versions in constraints.txt.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
OLDEST := .venv-oldest
# With a GPU, pip picks torch's CUDA build and the Triton that goes with it.
PINS := $(if $(shell command -v nvidia-smi),,-c constraints.txt)

.PHONY: demo test test-slow test-oldest lint docs clean

demo: $(STAMP)
	$(BIN)/python -m dsb_runtime.cli.demo

test: $(STAMP)
	$(BIN)/python -m pytest -n auto

test-slow: $(STAMP)
	$(BIN)/python -m pytest -n auto --dist loadfile -m slow

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Without a GPU, PIP_EXTRA_INDEX_URL should name an index of torch's CPU wheels, which need no CUDA.
test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/python -m pytest -n auto

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(PINS) -e ".[dev]"
	@touch $@

$(OLDEST)/.installed: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --upgrade pip
	$(OLDEST)/bin/python -m pip install --quiet -c constraints-oldest.txt -e ".[test]"
	@touch $@

clean:
	rm -rf $(VENV) $(OLDEST) build site *.egg-info .pytest_cache .ruff_cache .mypy_cache
