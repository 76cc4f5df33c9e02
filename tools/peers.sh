#!/bin/sh
# Makes .peers: the engines that benchmarks/engine.py measures beside ours. llama.cpp is compiled for this very machine
# (GGML_NATIVE), as its users are told to; that takes some minutes and needs a C++ compiler.
set -eu
cd "$(dirname "$0")/.."
[ -x .peers/bin/python ] || "${PYTHON:-python3}" -m venv .peers
CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF" .peers/bin/python -m pip install -qq --no-input --disable-pip-version-check \
    "llama-cpp-python>=0.3.36" numpy gguf
