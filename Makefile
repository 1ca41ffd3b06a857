# `make demo` and `make test` set everything up in .venv; nothing has to be done before.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test
demo: .venv/ready
	$(BIN)/kdguard demo

test: .venv/ready
	PATH="$(CURDIR)/$(BIN):$$PATH" scripts/check

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
