# make run | test | faults | docs | lab: each makes .venv when absent.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
OLLAMA_UP := $(BIN)/python -c 'import sys; from kofinetune.export import server_version; sys.exit(not server_version())'

.PHONY: run test faults check docs lab
run: $(READY)
	$(BIN)/kofinetune run

test: $(READY)
	$(BIN)/nbdev_test --n_workers 1 --timing $$($(OLLAMA_UP) && echo --flags ollama)
	$(BIN)/pytest -q -rs --durations=10 tests

faults: $(READY)
	$(BIN)/python benchmarks/faults.py --json benchmarks/results/faults.json

check: $(READY)
	PATH="$(CURDIR)/$(BIN):$$PATH" bash .ci/check

docs: $(VENV)/.docs-ready
	$(BIN)/sphinx-build -q -W --keep-going -b dirhtml -c docs nbs _site

lab: $(READY)
	$(BIN)/jupyter lab --notebook-dir nbs

$(READY): settings.ini setup.py .ci/constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; name one with: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip
	$(BIN)/pip install -q -c .ci/constraints.txt -e '.[dev,bench]'
	touch $@

$(VENV)/.docs-ready: $(READY)
	$(BIN)/pip install -q -c .ci/constraints.txt -e '.[docs]'
	touch $@
