#!/usr/bin/env bash
# The main job, offline, in under a minute: three tiny fine-tunes of one model, merged several ways and compared.
#   bash scripts/demo.sh [FOLDER]     # default: demo, or demo-2, ... where files of demo were changed
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

if (($#)); then
  folder=$1
else
  folder=$(.venv/bin/python -c '
from pathlib import Path
from merger.demo.folder import usable_folder
print(usable_folder(Path("demo")))')
  [[ $folder == demo ]] || echo "demo is not as a demo wrote it: it stays, and this demo goes to $folder"
fi
echo "the demo: .venv/bin/merger demo $folder --force"
exec .venv/bin/merger demo "$folder" --force
