#!/usr/bin/env bash
# Set up .venv if needed and run the tests: bash scripts/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
EXTRAS=dev source scripts/setup.sh
exec .venv/bin/python -m pytest "$@"
