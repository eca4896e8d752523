#!/usr/bin/env bash
# A search of recipes/search on base, code, french and wordnet of a zoo: sixteen methods with the same number of trials
# each, or with RECIPE=obim or RECIPE=cabs that paper's own.
#   scripts/zoo_search.sh ZOO DATA OUT [options of merger search, such as --set search.trials=5]
# DATA holds NAME.calibration.jsonl and NAME.heldout.jsonl. OUT gets trials.jsonl, best.yaml and report.md; the same
# command goes on where it was stopped. PYTHON names an interpreter that has merger, and optuna for the sixteen.
set -euo pipefail
zoo=$(realpath "$1") data=$(realpath "$2") out=$3
shift 3

recipe=$(dirname "${BASH_SOURCE[0]}")/../recipes/search/${RECIPE:-methods}.yaml
set -- --set "base=$zoo/base" "$@"
for name in code french wordnet; do
  set -- --set "experts.$name=$zoo/$name" --set "evaluation.data.$name=$data/$name.heldout.jsonl" "$@"
  if grep -q '^calibration:' "$recipe"; then
    set -- --set "calibration.data.$name=$data/$name.calibration.jsonl" "$@"
  fi
done
exec "${PYTHON:-python}" -m merger search "$recipe" --to "$out" "$@"
