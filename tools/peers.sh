#!/bin/sh
# Makes .peers: what the benchmarks measure beside ours. Without an argument, or with "engine": llama.cpp, for benchmarks/engine.py. With
# "tune": TRL and PEFT, for benchmarks/tune.py, on the very PyTorch that we use. llama.cpp is compiled for this very machine
# (GGML_NATIVE), as its users are told to; that takes some minutes and needs a C++ compiler.
set -eu
cd "$(dirname "$0")/.."
[ -x .peers/bin/python ] || "${PYTHON:-python3}" -m venv .peers
if [ "${1:-engine}" = tune ]; then
    .peers/bin/python -m pip install -qq --no-input --disable-pip-version-check \
        "torch==2.13.0" "trl==1.16.0" "peft==0.21.*" "transformers==5.24.*" datasets
    exit
fi
CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF" .peers/bin/python -m pip install -qq --no-input --disable-pip-version-check \
    "llama-cpp-python>=0.3.36" numpy gguf
