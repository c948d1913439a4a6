#!/usr/bin/env bash
# Builds the documentation site, without a network: runs/site/index.html. Extra arguments go to mkdocs build.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh
export NO_MKDOCS_2_WARNING=1
exec .venv/bin/python -m mkdocs build --quiet --config-file launch/site/mkdocs.yml "$@"
