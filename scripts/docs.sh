#!/usr/bin/env bash
# The site of docs/ in build/site; a warning, a broken link or a broken anchor is an error.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

.venv/bin/python -m sphinx -W --keep-going --quiet -c docs -b html . build/site
echo '<meta http-equiv="refresh" content="0; url=docs/index.html">' >build/site/index.html
echo "build/site/index.html is the site's first page"
