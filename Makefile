# make run | test | docs | links | po | lab: each makes .venv when absent.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
OLLAMA_UP := $(BIN)/python -c 'import sys; from kofinetune.export import server_version; sys.exit(not server_version())'

.PHONY: run test check docs links po lab
run: $(READY)
	$(BIN)/kofinetune run

test: $(READY)
	$(BIN)/nbdev_test --n_workers 1 --timing $$($(OLLAMA_UP) && echo --flags ollama)
	$(BIN)/pytest -q -rs --durations=15 -n 2 --dist loadfile tests

check: $(READY)
	PATH="$(CURDIR)/$(BIN):$$PATH" bash .ci/check

docs: $(VENV)/.docs-ready
	$(BIN)/python docs/build.py

# Whether every link of every page leads somewhere; asks the network.
links: $(VENV)/.docs-ready
	$(BIN)/sphinx-build -q -b linkcheck -c docs nbs build/linkcheck

# The messages of every page, and the Korean catalogues with them; what is new or has changed is left to translate.
po: $(VENV)/.docs-ready
	$(BIN)/sphinx-build -q -W --keep-going -b gettext -c docs nbs build/gettext
	$(BIN)/sphinx-intl update -p build/gettext -d docs/locale -l ko -w 0 --no-obsolete

# No news pop-up (.jupyter), and this environment's kernel before any other of the same name.
lab: $(READY)
	JUPYTER_PREFER_ENV_PATH=1 JUPYTER_CONFIG_PATH="$(CURDIR)/.jupyter" $(BIN)/jupyter lab --notebook-dir nbs --LabApp.default_url=/lab/tree/index.ipynb $(LAB)

$(READY): settings.ini setup.py .ci/constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; name one with: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip
	$(BIN)/pip install -q -c .ci/constraints.txt -e '.[dev,bench]'
	touch $@

$(VENV)/.docs-ready: $(READY)
	$(BIN)/pip install -q -c .ci/constraints.txt -e '.[docs]'
	touch $@
