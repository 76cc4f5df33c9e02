#!/bin/sh
# Makes .venv, or brings it up to date, with the versions of constraints.txt: tools/venv.sh [EXTRA]
# It needs a Python from 3.11 to 3.14 and nothing else. PYTHON=/path/to/python chooses one.
set -eu
cd "$(dirname "$0")/.."

fail() {
    printf 'error: %s\n' "$1" >&2
    exit 2
}

suits() { # a Python that runs, has a version that PyTorch is built for, and can make environments
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' >/dev/null 2>&1
}

if [ "$(uname -s) $(uname -m)" = "Darwin x86_64" ]; then
    fail "PyTorch is no longer built for Macs with Intel processors: use a Mac with Apple silicon, or Linux"
fi

if ! { [ -x .venv/bin/python ] && suits .venv/bin/python && .venv/bin/python -c 'import pip' 2>/dev/null; }; then
    found=""
    for python in ${PYTHON:+"$PYTHON"} python3.13 python3.12 python3.11 python3.14 python3 python; do
        if suits "$python"; then
            found=$python
            break
        fi
    done
    if [ -z "$found" ]; then
        have=$(python3 -V 2>/dev/null || true)
        fail "Python 3.11, 3.12, 3.13 or 3.14 is needed and ${have:-no Python} is here: install one (https://www.python.org/downloads), or name one with PYTHON=/path/to/python"
    fi
    "$found" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "$found cannot make environments: install its venv package (Debian and Ubuntu: sudo apt install python3-venv)"
    rm -rf .venv
    "$found" -m venv .venv
fi

# On Linux PyPI's PyTorch brings some 3 GB of CUDA libraries. Without an NVIDIA driver take the build without them.
index=""
if [ "$(uname -s)" = Linux ] && [ ! -e /proc/driver/nvidia/version ]; then
    cpu=https://download.pytorch.org/whl/cpu
    if .venv/bin/python -c "import urllib.request as r; r.urlopen('$cpu/torch/', timeout=5)" >/dev/null 2>&1; then
        index=$cpu
    fi
fi

echo "Installing into .venv; PyTorch is large, so the first time takes some minutes ..." >&2
.venv/bin/python -m pip install -qq --no-input --disable-pip-version-check --no-warn-script-location \
    --constraint constraints.txt ${index:+--extra-index-url "$index"} --editable ".${1:+[$1]}" </dev/null
