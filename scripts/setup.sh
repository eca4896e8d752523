# Makes .venv in the checkout with this package and its tools, at the versions of constraints.txt; sourced by its
# neighbours, which call .venv/bin/... by name: nothing is activated. An installed torch is kept (a GPU box brings its
# own build); without one, the pinned version is taken.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "merger needs Python 3.11 or later; name one with PYTHON=python3.12" >&2
  exit 1
}
step() { echo "setup: $*" >&2; }
install() { .venv/bin/python -m pip install --quiet --disable-pip-version-check -c .venv/constraints.txt "$@"; }

stamp=.venv/installed
decisive=(constraints.txt pyproject.toml merger/ops/kernels/*.[ch])  # the loops in C are compiled by the installation
if ! cmp -s <(cat "${decisive[@]}") "$stamp" 2>/dev/null; then
  if "$python" -c 'import torch' 2>/dev/null; then
    step "making .venv with the torch of $("$python" -c 'import sys; print(sys.executable)')"
    "$python" -m venv --system-site-packages .venv
    grep -v '^torch==' constraints.txt >.venv/constraints.txt
  else
    step "making .venv"
    "$python" -m venv .venv
    cp constraints.txt .venv/constraints.txt
    step "installing $(grep '^torch==' constraints.txt), which takes some minutes"
    install torch
  fi
  step "installing merger and its tools, and compiling its loops in C"
  install -e '.[dev,docs]'
  cat "${decisive[@]}" >"$stamp"
  step "done; nothing is activated: type .venv/bin/merger, or first: source .venv/bin/activate"
fi
