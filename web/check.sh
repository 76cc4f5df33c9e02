#!/bin/bash
# The page's own checks, and that criadero/serve/static is what its source builds. `web/check.sh --write` builds it there instead.
set -euo pipefail
cd "$(dirname "$0")"
npm ci --silent
npm run --silent check
npm run --silent test
if [ "${1:-}" = --write ]; then
    npm run --silent build -- --logLevel warn
    exit
fi
built=$(mktemp -d)
trap 'rm -rf "$built"' EXIT
npm run --silent build -- --outDir "$built" --logLevel warn
diff -r "$built" ../criadero/serve/static || {
    echo "error: criadero/serve/static is not what web/ builds; run web/check.sh --write and commit it" >&2
    exit 1
}
