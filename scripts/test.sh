#!/usr/bin/env bash
# Linters, types, layers, names, tests. Sets itself up; pass pytest arguments to run only some tests.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
.venv/bin/lint-imports --no-cache
.venv/bin/python scripts/check_names.py merger scripts 1.5
exec .venv/bin/python -m pytest "$@"
