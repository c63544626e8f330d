# make run | test | check | audit | faults | docs | links | po | lab | lock: each makes .venv when absent.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
OLLAMA_UP := $(BIN)/python -c 'import sys; from kofinetune.server import server_version; sys.exit(not server_version())'

.PHONY: run test notebooks tests check audit faults docs links po lab lock
run: $(READY)
	$(BIN)/kofinetune run

test: notebooks tests

notebooks: $(READY)
	$(BIN)/nbdev_test --n_workers 1 --timing $$($(OLLAMA_UP) && echo --flags ollama)

tests: $(READY)
	$(BIN)/pytest -q -rs --durations=15 -n 2 --dist loadfile --no-loadscope-reorder tests

faults: $(READY)
	$(BIN)/python benchmarks/faults.py --gemma 3 --json benchmarks/results/faults.json

check: $(READY)
	PATH="$(CURDIR)/$(BIN):$$PATH" bash .ci/check

docs: $(READY)
	$(BIN)/python docs/build.py

# Whether every link of every page leads somewhere; asks the network.
links: $(READY)
	$(BIN)/sphinx-build -q -b linkcheck -c docs nbs build/linkcheck

# The messages of every page, and the Korean catalogues with them; what is new or has changed is left to translate.
po: $(READY)
	$(BIN)/sphinx-build -q -W --keep-going -b gettext -c docs nbs build/gettext
	$(BIN)/sphinx-intl update -p build/gettext -d docs/locale -l ko -w 0 --no-obsolete

# No news pop-up (.jupyter), and this environment's kernel before any other of the same name.
lab: $(READY)
	JUPYTER_PREFER_ENV_PATH=1 JUPYTER_CONFIG_PATH="$(CURDIR)/.jupyter" $(BIN)/jupyter lab --notebook-dir nbs --LabApp.default_url=/lab/tree/index.ipynb $(LAB)

$(READY): settings.ini setup.py .ci/requirements.lock
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11, 2) and "Python 3.11.2 or newer is needed; name one with: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	sed -n '/^\(packaging\|pip\|setuptools\|wheel\)==/,/[^\]$$/p' .ci/requirements.lock >$(VENV)/first.lock
	$(BIN)/python -m pip install -q --require-hashes -r $(VENV)/first.lock
	$(BIN)/pip install -q --require-hashes --no-build-isolation -r .ci/requirements.lock
	$(BIN)/pip install -q --no-deps --no-build-isolation -e .
	touch $@

# Write .ci/requirements.lock anew, after a change of the dependencies in settings.ini.
lock:
	PATH="$(CURDIR)/$(BIN):$$PATH" bash .ci/lock

audit: $(READY)
	PATH="$(CURDIR)/$(BIN):$$PATH" bash .ci/audit
