#!/bin/sh
# Builds the compiled kernels with AddressSanitizer and UndefinedBehaviorSanitizer into build/sanitize (the installed module stays as it is)
# and runs the kernels' tests with them: tools/sanitize.sh [PYTEST ARGUMENTS]. It needs .venv with the dev extra, and g++ or clang++.
set -eu
cd "$(dirname "$0")/.."
python=$PWD/.venv/bin/python
folder=$PWD/build/sanitize
ninja=$(command -v ninja || true)

cmake -S criadero/kernels/csrc -B "$folder" ${ninja:+-G Ninja} -DPython_EXECUTABLE="$python" -DCRIADERO_SANITIZE=ON >/dev/null
cmake --build "$folder" -j2 >/dev/null

compiler=${CXX:-c++}
# Python itself is not instrumented, so the runtime has to be there first; what Python and its packages never free is not our leak.
runtime=$("$compiler" -print-file-name=libasan.so)
[ -f "$runtime" ] || runtime=$("$compiler" -print-file-name=libclang_rt.asan-$(uname -m).so)
export LD_PRELOAD="$runtime $("$compiler" -print-file-name=libstdc++.so)"
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
export CRIADERO_NATIVE="$folder"
[ $# -gt 0 ] || set -- tests/test_kernels_linear.py tests/test_kernels_step.py tests/test_kernels_train.py tests/test_engine_native.py
exec "$python" -m pytest -p no:cacheprovider -q -s "$@"
