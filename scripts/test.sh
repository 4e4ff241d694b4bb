#!/usr/bin/env bash
# Run the tests, two at a time. usage: bash scripts/test.sh [pytest arguments]
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$ROOT"
exec "$PYTHON" -m pytest -q -n 2 --dist loadfile "$@"
