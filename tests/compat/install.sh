#!/bin/sh
# Installs transformers 4.51.3 (April 2025) into .compat, beside the current one, for tests/test_checkpoints_hf.py.
# It shares torch, numpy and the rest with the environment that runs the tests.
set -eu
cd "$(dirname "$0")/../.."
PYTHON="${PYTHON:-.venv/bin/python}"
[ -x "$PYTHON" ] || PYTHON=python3
rm -rf .compat.partial
"$PYTHON" -m pip install --quiet --no-deps --target .compat.partial \
    "transformers==4.51.3" "tokenizers==0.21.*" "huggingface-hub==0.36.*" requests urllib3 charset-normalizer idna certifi
rm -rf .compat
mv .compat.partial .compat
