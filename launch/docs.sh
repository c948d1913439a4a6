#!/usr/bin/env bash
# Builds the documentation site, without a network: runs/site/index.html. Extra arguments go to mkdocs build. All pages can
# be read from the files; their search needs a server: python -m http.server --directory runs/site
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh
.venv/bin/python -c "import sys; sys.exit(sys.version_info < (3, 11))" ||
    { echo "docs: the generator of the site needs Python 3.11 or newer" >&2; exit 1; }
export NO_MKDOCS_2_WARNING=1
exec .venv/bin/python -m mkdocs build --config-file launch/site/mkdocs.yml "$@"
