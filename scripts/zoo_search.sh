#!/usr/bin/env bash
# Sixteen methods with the same number of trials each, on base, code, french and wordnet of a zoo:
#   scripts/zoo_search.sh ZOO DATA OUT [options of merger search, such as --set search.trials=5]
# DATA holds NAME.calibration.jsonl and NAME.heldout.jsonl. OUT gets trials.jsonl, best.yaml and report.md; the same
# command goes on where it was stopped. PYTHON names an interpreter that has merger and optuna.
set -euo pipefail
zoo=$(realpath "$1") data=$(realpath "$2") out=$3
shift 3

set -- --set "base=$zoo/base" "$@"
for name in code french wordnet; do
  set -- --set "experts.$name=$zoo/$name" \
    --set "calibration.data.$name=$data/$name.calibration.jsonl" \
    --set "evaluation.data.$name=$data/$name.heldout.jsonl" "$@"
done
recipe=$(dirname "${BASH_SOURCE[0]}")/../recipes/search/methods.yaml
exec "${PYTHON:-python}" -m merger search "$recipe" --to "$out" "$@"
