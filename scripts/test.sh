#!/usr/bin/env bash
# Set up .venv if needed and run the tests: bash scripts/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
EXTRAS=dev source scripts/setup.sh
# A file of tests stays on one process, with what it has made for all of its tests. -n 0 runs them in this one.
exec .venv/bin/python -m pytest -n auto --maxprocesses 4 --dist loadfile "$@"
