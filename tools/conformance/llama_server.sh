#!/bin/sh
# What llama.cpp's tests start in place of llama-server.
exec "$CRIADERO_PYTHON" "$(dirname "$0")/llama_server.py" "$@"
