#!/usr/bin/env bash
# Sets up and runs the whole test suite: style, then all tests on all cores. Arguments go to pytest.
#   --lowest    first: with the oldest transformers, torch and triton that pyproject.toml allows, in an environment of its own
set -euo pipefail
source "$(dirname "$0")/setup.sh"
cd "$root"
lowest=""
if [ "${1:-}" = --lowest ]; then
    lowest=lowest
    shift
fi
setup tests $lowest
say "Checking the style (ruff)"
"$python" -m ruff check .
"$python" -m ruff format --check .
say "Running the tests"
# One thread a process: the processes already use every core
OMP_NUM_THREADS=1 "$python" -m pytest -n auto "$@"
