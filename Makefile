# `make demo` and `make test` each do all the set-up on a machine that has only Python >= 3.10 and make.
#   make demo OUT=folder            where the artifact goes (default: out)
#   make test PYTHON=python3.12     another interpreter; VENV=folder for another environment
#   make venv PIP_ARGS="..."        more arguments for every `pip install`, such as PyTorch's CPU wheel index

SHELL := /bin/sh
.SHELLFLAGS := -eu -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# demo and bench measure time, so nothing may run beside them, not even under `make -j`
.NOTPARALLEL:

PYTHON ?= python3
VENV ?= .venv
OUT ?= out
BUDGET ?= 60%
PIP_ARGS ?=
PYTEST_ARGS ?=
# tests run side by side, a file to a process and one thread each: small models gain nothing from more
TEST_JOBS ?= auto
EXTRAS := cpu,dev,diffusers,docs,quality,report,rtx
BENCHMARKS := quality_reference routing_overhead speedup peers cost_model export_cost artifact_size load_memory

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -q $(PIP_ARGS) -c constraints.txt
TORCH := $(shell sed -n 's/^\(torch==[0-9.]*\).*/\1/p' constraints.txt)

.PHONY: help venv demo test lint docs bench soak clean

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' Makefile

venv: $(STAMP) ## the pinned environment in .venv

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "make: $(PYTHON) is missing or older than 3.10; call make with PYTHON=<a newer one>" >&2; exit 1; }
	@# an environment without pip was interrupted while it was made
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@echo "make: installing the pinned packages into $(VENV) (minutes the first time)"
	@# torch first and by its pin: a range would let another package pull the newest, largest build
	$(PIP_INSTALL) "$(TORCH)"
	$(PIP_INSTALL) -e ".[$(EXTRAS)]"
	@touch $@

demo: $(STAMP) ## compile the reference DiT into OUT: artifact and report
	$(BIN)/diffcr demo -o "$(OUT)" --budget "$(BUDGET)"

test: $(STAMP) ## all tests but gpu and soak, with the slowest listed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not gpu and not soak" -n $(TEST_JOBS) --maxprocesses=4 \
	  --dist loadfile --durations=15 $(PYTEST_ARGS)

lint: $(STAMP) ## ruff, mypy --strict on the package, import layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict -p diffcr_compile
	$(BIN)/lint-imports

docs: $(STAMP) ## check the docs against the code, build pages and API reference, warnings are errors
	$(BIN)/python docs/check_docs.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict -q

bench: $(STAMP) ## each benchmark once, in its short form
	@for name in $(BENCHMARKS); do \
	  echo "make: benchmarks/$$name.py --smoke"; $(BIN)/python -m benchmarks.$$name --smoke; \
	done

soak: $(STAMP) ## the long tests
	$(BIN)/python -m pytest -q -m soak --durations=0 $(PYTEST_ARGS)

clean: ## caches and build by-products; keeps .venv, build/ and artifacts
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache dist *.egg-info
	find . -path "./$(VENV)" -prune -o -type d -name __pycache__ -exec rm -rf {} +
