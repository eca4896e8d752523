#!/usr/bin/env bash
# What only a GPU can tell of merger, in at most eight minutes; run again, it goes on with the parts that are missing in OUT.
#
#     bash scripts/gpu_check.sh OUT [--device cuda] [--size 7B] [--minutes 8] [--work FOLDER] [--keep]
#
# It runs from a plain checkout with the packages of $PYTHON (python3). OUT/page.md is the page that it writes.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1

kernels=merger/ops/kernels
library=$kernels/_native$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
if [ ! -e "$library" ] && command -v cc > /dev/null; then # as pyproject.toml says
  cc -shared -fPIC -std=c11 -O3 -ffp-contract=off -fwrapv -fno-strict-aliasing -I $kernels $kernels/*.c -lm -o "$library"
fi
exec "$PYTHON" scripts/gpu_check.py "$@"
