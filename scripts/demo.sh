#!/usr/bin/env bash
# The main job, offline, in under a minute: three tiny fine-tunes of one model, merged several ways and compared.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

exec .venv/bin/merger demo "${1:-demo}" --force
