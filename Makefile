# Sessile: every target sets up what it needs by itself, in .venv beside this file. `make help` lists them.
# Needs python3 (3.11 or later), make and git. ARGS passes flags on: make serve ARGS="--port 8000"

SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules --no-print-directory

PYTHON_VENV := .venv/bin/python
# Whatever the shell says: tests start a hundred processes, none of which should compile all sources anew.
export PYTHONDONTWRITEBYTECODE :=
ARGS ?=
GPU_TESTS := $(wildcard tests/kernels/test_triton_*.py) tests/parity/test_tiny_models.py tests/parity/test_core_tiny_models.py \
	tests/parity/test_torn_sessions.py

# Stamps of a finished set-up; the second call of any target installs nothing.
RUNTIME := .venv/.installed-runtime
DEVELOPMENT := .venv/.installed-dev
CLIENTS := build/clients/.venv/.installed

.PHONY: help chat serve doctor compile bench test test-long check docs sim mutants soak clients grammars parity gpu-check gpu-bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' Makefile
	@echo '  ARGS="…" passes flags on, for example: make serve ARGS="--port 8000"'

chat: $(RUNTIME) ## talk to the embedded model in this terminal
	@$(PYTHON_VENV) -m sessile chat $(ARGS)

serve: $(RUNTIME) ## serve the embedded model over HTTP on 127.0.0.1:30000
	@$(PYTHON_VENV) -m sessile serve $(ARGS)

doctor: $(RUNTIME) ## say what this machine has and what is wrong with it
	@$(PYTHON_VENV) -m sessile doctor $(ARGS)

compile: $(DEVELOPMENT) ## compile the scheduler and the kernels of the CPU; both are optional, and faster
	@PYTHONPATH=. $(PYTHON_VENV) scripts/compile_core.py
	@PYTHONPATH=. $(PYTHON_VENV) scripts/compile_native.py

bench: compile ## measure the scheduler: host time of a step, and of a turn on a long history
	@$(PYTHON_VENV) -m sessile bench step $(ARGS)
	@$(PYTHON_VENV) -m sessile bench history

# Tests wait for servers a quarter of their time, so it takes three processes to keep two cores at work; files run in
# the order of tests/conftest.py, which has those that wait among those that compute.
TOGETHER := --numprocesses=3 --dist=loadfile --no-loadscope-reorder

# What measures time runs first and by itself. With ARGS, just what they say.
test: $(DEVELOPMENT) ## run the tests, but those of test-long
	@$(PYTHON_VENV) -m pytest $(or $(ARGS),-q tests/perf)
	@$(if $(ARGS),,$(PYTHON_VENV) -m pytest --ignore=tests/perf -m "not long" $(TOGETHER))

test-long: $(DEVELOPMENT) ## run the tests that compile something, go through many cases, or run every example
	@$(PYTHON_VENV) -m pytest -m long $(TOGETHER) $(ARGS)

check: $(DEVELOPMENT) ## lint, types, layers and tidy rules
	@failed=; \
	echo "lint (ruff)"; $(PYTHON_VENV) -m ruff check sessile tests scripts examples || failed+=" lint"; \
	echo "types (mypy)"; $(PYTHON_VENV) -m mypy || failed+=" types"; \
	echo "layers (import-linter)"; .venv/bin/lint-imports --no-cache | sed -n '/^Analyzed/,$$p' || failed+=" layers"; \
	echo "tidy rules, exports, docs (pytest)"; \
	$(PYTHON_VENV) -m pytest -q tests/test_tidy.py tests/test_exports.py tests/test_docs.py || failed+=" tidy"; \
	if [[ $$failed ]]; then echo "make check failed:$$failed"; exit 1; fi; echo "make check: all good"

# The theme would announce its successor at every build. To search the site: python3 -m http.server -d build/site
docs: $(DEVELOPMENT) ## build the documentation as a site, build/site/index.html
	@NO_MKDOCS_2_WARNING=1 $(PYTHON_VENV) -m mkdocs build --strict $(ARGS)

sim: $(RUNTIME) ## torment the scheduler in the simulator: make sim ARGS="--seeds 300 --steps 1000"
	@$(PYTHON_VENV) -m sessile.sim $(ARGS)

mutants: $(RUNTIME) ## plant faults in the scheduler; the simulator must catch each
	@$(PYTHON_VENV) -m sessile.sim mutants $(ARGS)

soak: $(RUNTIME) ## torment a server over HTTP for half an hour: make soak ARGS="--minutes 5"
	@$(PYTHON_VENV) scripts/soak.py $(ARGS)

clients: $(DEVELOPMENT) $(CLIENTS) ## run other people's clients and load generators: make clients ARGS="openai_sdk"
	@PYTHONPATH=. $(PYTHON_VENV) scripts/clients/run.py $(ARGS)

grammars: $(DEVELOPMENT) ## have a library judge a thousand outputs under forty schemas: make grammars ARGS="--rounds 1"
	@$(PYTHON_VENV) scripts/grammar_check.py $(ARGS)

parity: $(DEVELOPMENT) ## compare with transformers over the whole grid (up to 40 minutes)
	@$(PYTHON_VENV) -m pytest tests/parity tests/kernels/test_native.py --whole-grid --timeout=2400 --numprocesses=2 --dist=worksteal $(ARGS)

# On a machine with a GPU and no network, name a Python that has torch and Triton: make gpu-check GPU_PYTHON=python3
gpu-check: $(if $(GPU_PYTHON),,$(DEVELOPMENT)) ## test kernels, models and sessions on this machine's GPU; TEST=… runs one file
	@$(or $(GPU_PYTHON),$(PYTHON_VENV)) -m pytest -q $(or $(TEST),$(GPU_TESTS)) $(ARGS)

gpu-bench: $(if $(GPU_PYTHON),,$(RUNTIME)) ## measure decode steps, throughput and turns on this machine's GPU
	@PYTHONPATH=.:$$PYTHONPATH $(or $(GPU_PYTHON),$(PYTHON_VENV)) scripts/gpu_bench.py $(ARGS)

clean: ## remove .venv and everything that is made from the sources
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .numba_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(RUNTIME): pyproject.toml constraints.txt scripts/setup.sh
	@bash scripts/setup.sh runtime $(MAKECMDGOALS)

$(DEVELOPMENT): pyproject.toml constraints.txt scripts/setup.sh
	@bash scripts/setup.sh dev $(MAKECMDGOALS)

# 2 GB of tools that want what ours does not, hence an environment of their own. torch first, as in scripts/setup.sh.
$(CLIENTS): scripts/clients/requirements.txt constraints.txt | $(DEVELOPMENT)
	@echo "Setting up build/clients/.venv; this takes a few minutes, once." >&2
	@test -x build/clients/.venv/bin/pip || $(PYTHON_VENV) -m venv build/clients/.venv
	@build/clients/.venv/bin/pip install -q --disable-pip-version-check "$$(sed -n 's/^\(torch==[^ ]*\).*/\1/p' constraints.txt)"
	@build/clients/.venv/bin/pip install -q --disable-pip-version-check -r scripts/clients/requirements.txt
	@touch $@
