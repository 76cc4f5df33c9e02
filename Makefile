# What is made: .venv (demo), the tests' tools in it (test), .compat (an older transformers, for one test).
# `make` alone lists the targets. PYTHON=/path/to/python chooses the interpreter for .venv.
.PHONY: help demo test test-all lint docs bench compat constraints clean

help:
	@echo "make demo     install into .venv, then customise the bundled model and talk to it"
	@echo "make test     the fast tests (make test-all: the slow ones too)"
	@echo "make lint     ruff and mypy"
	@echo "make docs     write docs/reference from the code, and run the examples in the documents"
	@echo "make bench    seconds and memory of each step of the demo"
	@echo "make compat   check what is written against an older transformers"
	@echo "make clean    remove .venv, .compat and caches (never a model)"

demo: .venv/installed
	@.venv/bin/criadero demo

test: .venv/installed-dev .compat/installed
	@.venv/bin/python -m pytest

test-all: .venv/installed-dev .compat/installed
	@.venv/bin/python -m pytest -m "slow or not slow"

lint: .venv/installed-dev
	@.venv/bin/python -m ruff check .
	@.venv/bin/python -m ruff format --check .
	@.venv/bin/python -m mypy

docs: .venv/installed-dev
	@.venv/bin/python docs/generate.py
	@.venv/bin/python -m pytest tests/test_docs.py -m "slow or not slow"

bench: .venv/installed
	@.venv/bin/python benchmarks/demo.py

compat: .venv/installed-dev .compat/installed
	@.venv/bin/python -m pytest tests/test_checkpoints_hf.py

constraints: .venv/installed-dev
	@.venv/bin/python tools/constraints.py

clean:
	@rm -rf .venv .compat .compat.partial build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/installed: pyproject.toml constraints.txt tools/venv.sh
	@./tools/venv.sh
	@touch $@

.venv/installed-dev: pyproject.toml constraints.txt tools/venv.sh
	@./tools/venv.sh dev
	@touch .venv/installed $@

.compat/installed: tests/compat/install.sh .venv/installed-dev
	@PIP_QUIET=1 PYTHON=.venv/bin/python ./tests/compat/install.sh
	@touch $@
