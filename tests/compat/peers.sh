#!/bin/sh
# Installs TRL and mergekit into .compat-peers and runs the tests that compare with them: tests/test_tune_peers.py, tests/test_merge.py.
# They share torch, transformers, peft and the rest with the environment that runs the tests, whose versions are pinned.
set -eu
cd "$(dirname "$0")/../.."
PYTHON="${PYTHON:-.venv/bin/python}"
rm -rf .compat-peers.partial
"$PYTHON" -m pip install --quiet --disable-pip-version-check --no-deps --target .compat-peers.partial \
    "trl==1.16.0" "datasets==5.*" dill multiprocess xxhash pandas python-dateutil tzdata "mergekit==0.1.5" immutables scipy
rm -rf .compat-peers
mv .compat-peers.partial .compat-peers
PYTHONPATH="$PWD/.compat-peers" "$PYTHON" -m pytest -m "slow or not slow" tests/test_tune_peers.py tests/test_merge.py
