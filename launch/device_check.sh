#!/usr/bin/env bash
# One check of a machine with an accelerator and no network: numbers, kernels, speed. See launch/device_check.py --help.
#   ./launch/device_check.sh --out=check [--wheels=DIR] [--minutes=8] [--steps=NAME,NAME] [--tiny] [--plan]
# PYTHON names the interpreter that has JAX.
set -euo pipefail
export PYTHONPATH="$(cd "$(dirname "$0")/.." && pwd)${PYTHONPATH:+:$PYTHONPATH}"
. "${PYTHONPATH%%:*}/launch/env.sh"
exec "${PYTHON:-python3}" "${PYTHONPATH%%:*}/launch/device_check.py" "$@"
