#!/usr/bin/env bash
# Format, lint, types, walls and tests, on all cores. Arguments go to pytest, e.g.: scripts/test.sh tests/data -k digits
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

prepare_environment dev,data,serve,openvino
cd "$root"
heading "ruff format --check"
ruff format --check .
heading "ruff check"
ruff check .
heading "mypy"
mypy
heading "lint-imports"
lint-imports
heading "pytest${*:+ $*}"
# A file's tests share what it trains, so a file stays together; one thread each, or processes wait for one another.
OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" python -m pytest -n logical --dist loadfile --no-loadscope-reorder "$@"
