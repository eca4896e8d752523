#!/usr/bin/env bash
# Linters, types, layers, names, tests. Sets itself up; pass pytest arguments to run only some tests.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
.venv/bin/lint-imports --no-cache
.venv/bin/python scripts/check_names.py merger scripts tests 1.5
if (($#)); then
  exec .venv/bin/python -m pytest "$@"
fi
exec .venv/bin/python -m pytest -n auto --cov=merger --cov-report=term:skip-covered --cov-fail-under=96
