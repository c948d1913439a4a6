#!/usr/bin/env bash
# Sets up .venv if needed and runs the test suite, two files at a time. Extra arguments go to pytest:
#   bash launch/test.sh -k layout
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh
# Tests are small: one thread per process is faster and leaves the cores to the other ranks.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false
exec .venv/bin/python -m pytest -n 2 --dist loadfile "$@"
