#!/usr/bin/env bash
# Set up .venv if needed and run the fast tests: bash scripts/test.sh [pytest arguments]
# The others: bash scripts/test.sh -m slow. All of them: -m "". A later -m takes the place of an earlier one.
set -euo pipefail
cd "$(dirname "$0")/.."
EXTRAS=dev source scripts/setup.sh
# A file of tests stays on one process, with what it has made for all of its tests. -n 0 runs them in this one.
exec .venv/bin/python -m pytest -n auto --maxprocesses 4 --dist loadfile -m "not slow" "$@"
