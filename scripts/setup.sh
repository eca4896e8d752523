# Makes .venv in the checkout with this package and its tools, at the versions of constraints.txt; sourced by its
# neighbours. An installed torch is kept (a GPU box brings its own build); without one, the pinned version is taken.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "merger needs Python 3.11 or later; name one with PYTHON=python3.12" >&2
  exit 1
}
stamp=.venv/installed
decisive=(constraints.txt pyproject.toml merger/ops/kernels/*.[ch])  # the loops in C are compiled by the installation
if ! cmp -s <(cat "${decisive[@]}") "$stamp" 2>/dev/null; then
  if "$python" -c 'import torch' 2>/dev/null; then
    "$python" -m venv --system-site-packages .venv
    grep -v '^torch==' constraints.txt >.venv/constraints.txt
  else
    "$python" -m venv .venv
    cp constraints.txt .venv/constraints.txt
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -c .venv/constraints.txt torch
  fi
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -c .venv/constraints.txt -e '.[dev,docs]'
  cat "${decisive[@]}" >"$stamp"
fi
