# `make demo` and `make test` each do all the set-up on a machine that has only Python >= 3.10 and make.
#   make demo OUT=folder            where the artifact goes (default: out)
#   make test PYTHON=python3.12     another interpreter; VENV=folder for another environment
#   make venv PIP_ARGS="..."        more arguments for every `pip install`, such as PyTorch's CPU wheel index
#   make venv HASHES=               by version only, where packages are installed by sha256 otherwise

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
EXTRAS := cpu,dev,diffusers,docs,rtx
BENCHMARKS := quality_reference routing_overhead routing_gap speedup peers cost_model export_cost artifact_size load_memory
AUDIT := pip-audit==2.10.1

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip install --disable-pip-version-check -q $(PIP_ARGS)
PIP_INSTALL := $(PIP) -c constraints.txt
# files are checked by sha256 where interpreter and platform are those of the list, unless PIP_ARGS asks for other files
LOCK := requirements-ci.txt
IS_LOCKED := import platform as p, sys; sys.exit((p.python_implementation(), *sys.version_info[:2], sys.platform, \
  p.machine()) != ("CPython", 3, 11, "linux", "x86_64"))
ifeq ($(strip $(PIP_ARGS)),)
HASHES ?= $(shell $(PYTHON) -c '$(IS_LOCKED)' 2>/dev/null && echo $(LOCK))
endif
TORCH := $(shell sed -n 's/^\(torch==[0-9.]*\).*/\1/p' constraints.txt)

.PHONY: help venv demo test lint docs bench soak sbom audit clean

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' Makefile

venv: $(STAMP) ## the pinned environment in .venv

$(STAMP): pyproject.toml constraints.txt $(LOCK)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "make: $(PYTHON) is missing or older than 3.10; call make with PYTHON=<a newer one>" >&2; exit 1; }
	@# an environment without pip was interrupted while it was made
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@echo "make: installing the pinned packages into $(VENV) (minutes the first time)"
ifneq ($(HASHES),)
	@# setuptools first: one package is built from its source, and nothing may be fetched unseen for that
	sed -n '/^setuptools==/,/[0-9a-f]$$/p' $(HASHES) >$(VENV)/first.txt
	$(PIP) --require-hashes --no-deps -r $(VENV)/first.txt
	@# of torch the build for the CPU where pip finds it; a hash that is known makes pip prefer the other one
	sed -n '/^torch==/,/[0-9a-f]$$/p' $(HASHES) | sed 's/^torch==[0-9.]*/&+cpu/' >$(VENV)/torch.txt
	$(PIP) --require-hashes --no-deps -r $(VENV)/torch.txt 2>/dev/null || echo "make: no CPU build of torch here, taking PyPI's"
	$(PIP) --require-hashes --no-deps --no-build-isolation -r $(HASHES)
	@# nothing is left to do for a CPU build of torch; the CUDA build gets the libraries that it pins itself
	$(PIP_INSTALL) "$(TORCH)"
	$(PIP) --no-deps --no-build-isolation -e .
else
	@# torch first and by its pin: a range would let another package pull the newest, largest build
	$(PIP_INSTALL) "$(TORCH)"
	$(PIP_INSTALL) -e ".[$(EXTRAS)]"
endif
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

soak: $(STAMP) ## the long tests, and those that draw their cases with many more of them
	$(BIN)/python -m pytest -q -m soak --durations=0 $(PYTEST_ARGS)
	DIFFCR_EXAMPLES=2000 $(BIN)/python -m pytest -q tests/test_corrupted_inputs.py $(PYTEST_ARGS)

sbom: $(STAMP) ## bill of materials of the environment (CycloneDX) in build/sbom.json
	$(BIN)/python .ci/sbom.py build/sbom.json

audit: $(STAMP) ## known vulnerabilities of the packages that CI installs; fails where no database can be reached
	@test -x $(VENV)-audit/bin/pip-audit || { $(PYTHON) -m venv $(VENV)-audit && \
	  $(VENV)-audit/bin/python -m pip install -q "$(AUDIT)"; }
	$(VENV)-audit/bin/pip-audit --strict --disable-pip --no-deps -r $(LOCK)

clean: ## caches and build by-products; keeps .venv, build/ and artifacts
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache dist *.egg-info
	find . -path "./$(VENV)" -prune -o -type d -name __pycache__ -exec rm -rf {} +
