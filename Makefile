# `make serve` and `make test` work from a fresh clone with nothing but Python >= 3.11 and the
# package registries: everything goes into ./.venv.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	if command -v $$p >/dev/null && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; \
	then echo $$p; break; fi; done)
BIN := .venv/bin

# On macOS mlx comes by itself; on Linux an extra chooses its build.
ifeq ($(shell uname -s),Darwin)
  MLX :=
else ifneq ($(shell command -v nvidia-smi 2>/dev/null),)
  MLX := cuda13
else
  MLX := cpu
endif
comma := ,

QUICK := not models and not long and not clients and not faults
# Parts of the tests, the longest first; the engine's apart from what its folders hold.
PARTS := kernels serve engine simulated models servers engine-folders loadtest rest
unit-kernels := tests/kernels
unit-simulated := $(wildcard tests/engine/test_simulated_*.py)
unit-engine := $(filter-out $(unit-simulated),$(wildcard tests/engine/test_*.py))
unit-serve := tests/serve
unit-models := tests/models
unit-servers := tests/e2e
unit-engine-folders := $(filter-out %__pycache__/,$(wildcard tests/engine/*/))
unit-loadtest := tests/loadtest
unit-rest := tests/deploy tests/page tests/cache $(wildcard tests/test_*.py)

.DEFAULT_GOAL := help
.PHONY: help serve test lint format types unit test-faults test-long test-models test-clients soak gaps \
	kills clean

help:
	@echo "make serve        serve the demo model on http://127.0.0.1:8000 (ARGS=\"--model ...\")"
	@echo "make test         lint, types, import rules and tests"
	@echo "make test-faults  kills, stops and abuse of a real server, for minutes"
	@echo "make test-long    tests that take minutes"
	@echo "make test-models  every model family against mlx-lm, token for token"
	@echo "make test-clients real clients and agents from PyPI and npm"
	@echo "make soak         a mixed load for two hours (ARGS=\"--faults --minutes 60\": with kills)"
	@echo "make gaps         what scrapes and large bodies do to running streams"
	@echo "make kills        how soon a server is back after kill -9 (ARGS=\"--kills 50 --healthy 0\": faster)"
	@echo "make format       format the code"

serve: .venv/serve.stamp
	$(BIN)/quire serve $(ARGS)

test: lint types unit

lint: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/dev.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The installed wheel is what gets checked, so that a file missing from it shows.
types: .venv/dev.stamp
	@rm -rf build
	$(BIN)/pip install --quiet --no-deps --target build/site .
	MYPYPATH=build/site $(BIN)/mypy -p quire.serve -p quire.engine -p quire.cache -p quire.kernels \
		-p quire.deploy -p quire.loadtest

# Four parts at a time, as some wait most of theirs. With ARGS, only those.
unit: .venv/dev.stamp
ifdef ARGS
	$(BIN)/pytest -m "$(QUICK)" $(ARGS)
else
	@$(MAKE) --no-print-directory -j4 --keep-going $(PARTS:%=unit-%)
endif

$(PARTS:%=unit-%): .venv/dev.stamp
	$(BIN)/pytest -m "$(QUICK)" $($@)

test-faults: .venv/dev.stamp
	$(BIN)/pytest -m faults $(ARGS)

test-long: .venv/dev.stamp
	$(BIN)/pytest -m long $(ARGS)

test-models: .venv/dev.stamp
	$(BIN)/pytest tests/models/test_zoo_builds.py $(ARGS)
	$(BIN)/python tests/models/family_table.py --out loadtest/results/model_families.json

# Judged at the end; ARGS="--out FILE --plot FILE" keeps what was measured.
soak: .venv/dev.stamp
	$(BIN)/python -m quire.loadtest.soak $(ARGS)

gaps: .venv/dev.stamp
	$(BIN)/python -m quire.loadtest.gaps $(ARGS)

kills: .venv/dev.stamp
	$(BIN)/python -m quire.loadtest.kills $(ARGS)

# Clients pin each other's libraries, so each has an environment of its own.
PYTHON_CLIENTS := $(basename $(notdir $(wildcard tests/clients/requirements/*.txt)))

test-clients: .venv/dev.stamp $(PYTHON_CLIENTS:%=.venv/clients/%.stamp) tests/clients/node/node_modules \
		tests/clients/agents/node_modules
	$(BIN)/pytest -m clients tests/clients $(ARGS)

.venv/clients/%.stamp: tests/clients/requirements/%.txt | .venv/bin/python
	$(BIN)/python -m venv .venv/clients/$*
	.venv/clients/$*/bin/pip install --quiet --disable-pip-version-check -r $<
	@touch $@

tests/clients/node/node_modules: tests/clients/node/package-lock.json
	npm ci --prefix tests/clients/node --no-audit --no-fund
	@touch $@

# Without a lock: these have optional parts for other systems that not every registry knows.
tests/clients/agents/node_modules: tests/clients/agents/package.json
	npm install --prefix tests/clients/agents --no-package-lock --no-audit --no-fund
	@touch $@

clean:
	rm -rf .venv build *.egg-info

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "Quire needs Python 3.11 or newer; set PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv .venv

.venv/serve.stamp: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".$(if $(MLX),[$(MLX)])"
	@touch $@

.venv/dev.stamp: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev$(if $(MLX),$(comma)$(MLX))]"
	@touch $@ .venv/serve.stamp
