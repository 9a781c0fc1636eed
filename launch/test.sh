#!/usr/bin/env bash
# Makes .venv if it is not there, lints, and runs the tests: ./launch/test.sh [--all] [pytest arguments]
# --all adds the tests marked slow. The environment variable VENV names another virtual environment.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/env.sh
. launch/install.sh test
marks=(-m "not slow")
if [ "${1:-}" = "--all" ]; then marks=(); shift; fi
ruff check .
ruff format --check .
# One XLA thread pool a worker: on few cores two workers share them well.
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
python -m pytest -n "${TEST_WORKERS:-2}" --dist loadgroup "${marks[@]}" "$@"
