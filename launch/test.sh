#!/usr/bin/env bash
# Makes .venv if it is not there, lints, and runs the tests: ./launch/test.sh [--all] [pytest arguments]
# --all adds the tests marked slow. Environment variables: PYTHON, the interpreter to make it with, and VENV, another
# folder for it; EXTRAS=test leaves torch and the other peers out, whose tests are then skipped.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/env.sh
. launch/install.sh "${EXTRAS:-test,peers}"
marks=(-m "not slow")
if [ "${1:-}" = "--all" ]; then marks=(); shift; fi
ruff check .
ruff format --check .
# One XLA thread pool a worker: on few cores two workers share them well.
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
python -m pytest -n "${TEST_WORKERS:-2}" --dist loadgroup --no-loadscope-reorder "${marks[@]}" "$@"
