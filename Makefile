# What is made: .venv (demo), the tests' tools in it (test), .compat and .compat-peers (an older transformers, TRL and mergekit, for some tests),
# .peers (llama.cpp, for bench),
# .conformance (outside suites).
# `make` alone lists the targets. PYTHON=/path/to/python chooses the interpreter for .venv.
.PHONY: help demo test test-all lint docs bench compat compat-peers conformance constraints cria page page-check clean

help:
	@echo "make demo     install into .venv, then customise the bundled model and talk to it"
	@echo "make test     the fast tests (make test-all: the slow ones too)"
	@echo "make lint     ruff and mypy"
	@echo "make docs     write docs/reference from the code, and run the examples in the documents"
	@echo "make bench    the demo's steps, a training step beside transformers, the engine beside llama.cpp (built into .peers)"
	@echo "make compat   check what is written against an older transformers"
	@echo "make compat-peers   losses beside TRL's and PEFT's, merged models beside mergekit's"
	@echo "make conformance   run the suites of others against the server (installed into .conformance; one needs Node.js)"
	@echo "make cria     raise the bundled models again from their sources (hours; goes on where it was cut off)"
	@echo "make page     build the chat page from web/ into criadero/serve/static (needs npm; page-check: only compare)"
	@echo "make clean    remove .venv, .peers, .compat, .compat-peers, .conformance and caches (never a model)"

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

bench: .venv/installed-dev .peers/installed
	@.venv/bin/python benchmarks/demo.py
	@.venv/bin/python benchmarks/train_step.py
	@.venv/bin/python benchmarks/engine.py

compat: .venv/installed-dev .compat/installed
	@.venv/bin/python -m pytest tests/test_checkpoints_hf.py

compat-peers: .venv/installed-dev
	@./tests/compat/peers.sh

conformance: .venv/installed-dev
	@.venv/bin/python tools/conformance/run.py --suite all
	@.venv/bin/python docs/generate.py

constraints: .venv/installed-dev
	@.venv/bin/python tools/constraints.py

cria: .venv/installed
	@.venv/bin/criadero run recipes/cria
	@rm -rf criadero/bundled/cria criadero/bundled/cria-chat
	@mkdir -p criadero/bundled
	@cp -R out/cria/04-pretrain criadero/bundled/cria
	@cp -R out/cria/06-chat criadero/bundled/cria-chat
	@.venv/bin/criadero passport verify cria
	@.venv/bin/criadero passport verify cria-chat

page:
	@web/check.sh --write

page-check:
	@web/check.sh

clean:
	@rm -rf .venv .peers .compat .compat.partial .compat-peers .compat-peers.partial .conformance build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/installed: pyproject.toml constraints.txt tools/venv.sh $(wildcard criadero/kernels/csrc/*)
	@./tools/venv.sh
	@touch $@

.venv/installed-dev: pyproject.toml constraints.txt tools/venv.sh $(wildcard criadero/kernels/csrc/*)
	@./tools/venv.sh dev
	@touch .venv/installed $@

.peers/installed: tools/peers.sh
	@./tools/peers.sh
	@touch $@

.compat/installed: tests/compat/install.sh .venv/installed-dev
	@PIP_QUIET=1 PYTHON=.venv/bin/python ./tests/compat/install.sh
	@touch $@
