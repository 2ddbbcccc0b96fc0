# make course: the whole course on this machine; make test: every check; make lab: open the
# notebooks; make bench: compare every way to search, after make course; make experiments: what each setting of the
# training does, half an hour or more; make publish: take a run's notebooks and figures into the project.
SHELL := /bin/sh
VENV := .venv
BIN := $(VENV)/bin
# The first interpreter that really starts and is new enough; override with make PYTHON=…
PYTHON ?= $(shell for p in python3.12 python3.11 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

.PHONY: course test lab bench experiments publish

course: $(VENV)/installed
	$(BIN)/python -m bmf_matryoshka run

test: $(VENV)/installed
	$(BIN)/ruff format --check src tests notebooks
	$(BIN)/ruff check src tests notebooks
	$(BIN)/mypy
	$(BIN)/pytest

lab: $(VENV)/installed
	$(BIN)/jupyter lab notebooks

bench: $(VENV)/installed
	$(BIN)/python -m bmf_matryoshka bench

experiments: $(VENV)/installed
	$(BIN)/python -m bmf_matryoshka experiments

publish: $(VENV)/installed
	$(BIN)/python -m bmf_matryoshka publish

$(VENV)/installed: requirements.txt constraints.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or newer found: install one, or say make PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@
