#!/bin/sh
# Makes .peers: what the benchmarks measure beside ours. Without an argument, or with "engine": llama.cpp, for benchmarks/engine.py. With
# "openvino": OpenVINO, and what makes its models, for the same script (--peer llama.cpp,openvino). With
# "tune": TRL and PEFT, for benchmarks/tune.py, on the very PyTorch that we use. With "server": llama.cpp's own server and
# llama-cpp-python's, for benchmarks/serve.py, of one source. llama.cpp is compiled for this very machine (GGML_NATIVE), as its users are
# told to; that takes some minutes and needs a C++ compiler (and, for its server, cmake).
set -eu
cd "$(dirname "$0")/.."
[ -x .peers/bin/python ] || "${PYTHON:-python3}" -m venv .peers
if [ "${1:-engine}" = tune ]; then
    .peers/bin/python -m pip install -qq --no-input --disable-pip-version-check \
        "torch==2.13.0" "trl==1.16.0" "peft==0.21.*" "transformers==5.24.*" datasets
    exit
fi
if [ "${1:-engine}" = openvino ]; then
    .peers/bin/python -m pip install -qq --no-input --disable-pip-version-check \
        "openvino==2026.4.1" "openvino-genai==2026.4.1.*" "openvino-tokenizers==2026.4.1.*" numpy gguf
    exit
fi
extra=""
if [ "${1:-engine}" = server ]; then
    extra="[server]"
    if [ ! -x .peers/bin/llama-server ]; then
        mkdir -p .peers/source
        .peers/bin/python -m pip download -q --no-input --disable-pip-version-check --no-deps --no-binary llama-cpp-python \
            -d .peers/source "llama-cpp-python>=0.3.36"
        tar -xzf .peers/source/llama_cpp_python-*.tar.gz -C .peers/source
        cmake -S .peers/source/llama_cpp_python-*/vendor/llama.cpp -B .peers/build -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON \
            -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF \
            -DLLAMA_BUILD_APP=OFF
        cmake --build .peers/build --target llama-server --parallel 2
        ln -sf ../build/bin/llama-server .peers/bin/llama-server
    fi
fi
CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF" .peers/bin/python -m pip install -qq --no-input --disable-pip-version-check \
    "llama-cpp-python$extra>=0.3.36" numpy gguf
