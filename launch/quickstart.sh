#!/usr/bin/env bash
# Fine-tunes a small Llama with MicroAdam under DeepSpeed, next to AdamW. Nothing is downloaded but Python packages.
#   bash launch/quickstart.sh [--fresh]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh
exec .venv/bin/python launch/quickstart.py "$@"
