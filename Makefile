# The commands a newcomer types. They need Python 3.11 (or newer) and pip; everything goes into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c .ci/constraints.txt

.PHONY: quickstart test test-all lint notebooks clean

quickstart: $(VENV)/.installed          ## install, then train: cold start, then SAPO (minutes on two cores)
	$(BIN)/sapo-jax train configs/quickstart.yaml

test: $(VENV)/.installed-test           ## the tests, without the slow ones
	$(BIN)/python -m pytest -m "not slow"

test-all: $(VENV)/.installed-test       ## all tests
	$(BIN)/python -m pytest

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

notebooks: $(VENV)/.installed           ## run the notebooks and store their outputs
	$(PIP) -e '.[notebooks]'
	$(BIN)/jupytext --to ipynb --execute notebooks/*.py

clean:                                  ## remove the environment (not the runs)
	rm -rf $(VENV)

$(VENV)/.installed: pyproject.toml .ci/constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(PIP) -e .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) -e '.[test]'
	touch $@
