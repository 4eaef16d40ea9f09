# Two commands on a fresh machine with Python 3.11 or 3.12: `make demo` and `make test`.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
RUN := lvd-demo

.PHONY: help demo test check clean

help:
	@echo "make demo   set up .venv and curate a small web drawn and served on this machine"
	@echo "make test   set up .venv and run the tests"
	@echo "make check  set up .venv and run ruff, mypy and the test of which folder may import which"
	@echo "make clean  delete .venv and the demo's run"

$(VENV)/.demo: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[cpu]' -c constraints.txt
	touch $@

$(VENV)/.test: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]' -c constraints.txt
	touch $@ $(VENV)/.demo

demo: $(VENV)/.demo
	$(BIN)/lvd demo --out $(RUN)

test: $(VENV)/.test
	$(BIN)/python -m pytest

check: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_arrows.py

clean:
	rm -rf $(VENV) $(RUN)
