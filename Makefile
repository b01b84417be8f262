# make demo   quantize and click through a phantom study; pictures, table and report in demo-output/
# make test   ruff, mypy and all tests
# make check  the same with the quick tests only
#
# PYTHON chooses the interpreter of the environment (3.10, 3.11 or 3.12); by default the first that works.

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell for p in python3.11 python3.12 python3.10 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && echo $$p && break; \
	done)

.PHONY: demo test check lint clean

demo: $(VENV)/.installed
	$(BIN)/dfqsam demo

test: lint
	$(BIN)/pytest

check: lint
	$(BIN)/pytest -m "not slow"

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/.installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "no Python 3.10, 3.11 or 3.12 found; name one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) demo-output build dist
