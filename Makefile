# Two commands do everything: `make serve` and `make test`. The rest is for working on llmserve.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL ?= smollm2-135m-instruct
EMBEDDING_MODEL ?= all-minilm-l6-v2

.PHONY: serve install install-dev test check fmt bench gpu docs clean
serve: install
	$(BIN)/llmserve serve $(MODEL) --embedding-model $(EMBEDDING_MODEL) --model-repository examples/model_repository $(ARGS)

install: $(VENV)/.installed

test: install-dev
	$(BIN)/python -m pytest -q $(ARGS)

check: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_architecture.py

fmt: install-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install-dev
	$(BIN)/python -m benchmarks

# Tests on the device and measurements, under 9 minutes on one GPU, nothing fetched: the Python in use must have torch.
gpu:
	PYTHONPATH=. $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m benchmarks.gpu $(ARGS)

docs: install-dev
	$(BIN)/python -m pytest -q tests/test_docs.py

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "llmserve needs Python 3.11 or newer; try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	@echo "Installing llmserve and its dependencies (1.4 GB or more) into $(VENV) ..."
	@$(BIN)/python -m pip install --quiet --editable .
	@touch $@

install-dev: $(VENV)/.installed-dev

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/bin/python
	@echo "Installing llmserve, its dependencies and what its tests need (1.4 GB or more) into $(VENV) ..."
	@$(BIN)/python -m pip install --quiet --editable '.[test,dev]'
	@touch $@ $(VENV)/.installed
