# Each target sets up all it needs in .venv, from a bare clone with only Python and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE = 1
export TRANSFORMERS_VERBOSITY = error

.PHONY: help demo test test-slow check format bench docs clean
.DEFAULT_GOAL := help

help:
	@echo "make demo       train two real models under a plan that AdaPtis finds (about three minutes)"
	@echo "make test       the tests (under 12 minutes on 2 cores)"
	@echo "make test-slow  the long sweeps"
	@echo "make check      format, lint, types, and the rules of the tree"
	@echo "make bench      the benchmarks: a table and dated JSON each"
	@echo "make docs       what the pages of docs/ show, simulated and drawn anew"

$(VENV)/.installed: pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "setting up $(VENV) (a minute or two, once) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[torch]' --group dev
	@$(BIN)/python -c 'from adaptis.search.tune import warm_up; warm_up()'
	@touch $@

demo: $(VENV)/.installed
	@$(BIN)/adaptis demo

test: $(VENV)/.installed
	@$(BIN)/python -m pytest -q -m 'not slow and not alone' -n 2 --dist loadfile
	@$(BIN)/python -m pytest -q -m 'not slow and alone'

test-slow: $(VENV)/.installed
	@$(BIN)/python -m pytest -q -m slow --timeout 1800

check: $(VENV)/.installed
	@$(BIN)/ruff format --check --diff src tests benchmarks docs
	@$(BIN)/ruff check src tests benchmarks docs
	@$(BIN)/pyrefly check --summary=none
	@$(BIN)/python -m pytest -q tests/test_tree.py

format: $(VENV)/.installed
	@$(BIN)/ruff format src tests benchmarks docs
	@$(BIN)/ruff check --fix src tests benchmarks docs

bench: $(VENV)/.installed
	@for file in benchmarks/*.py; do echo "== $$file"; $(BIN)/python $$file || exit 1; done

docs: $(VENV)/.installed
	@$(BIN)/python docs/build.py

clean:
	rm -rf $(VENV) .pytest_cache .hypothesis .ruff_cache
