#!/usr/bin/env bash
# Makes .venv with everything the other scripts need; does nothing when it is up to date.
#   PYTHON=python3.12 bash launch/setup.sh     chooses the interpreter
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
    echo "setup: $*" >&2
    exit 1
}

constraints=.ci/constraints.txt
stamp=.venv/installed
if [[ -f $stamp && "$(cat pyproject.toml CMakeLists.txt "$constraints" launch/setup.sh | cksum)" == "$(<"$stamp")" ]]; then
    exit 0
fi

python=${PYTHON:-python3}
command -v "$python" >/dev/null || fail "$python is not there; install Python 3.10 or newer, or set PYTHON."
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    fail "$("$python" --version) is too old; Python 3.10 or newer is needed (PYTHON=... chooses another one)."

if [[ ! -x .venv/bin/python ]]; then
    echo "setup: making .venv with $("$python" --version)"
    "$python" -m venv .venv || {
        rm -rf .venv
        fail "'$python -m venv' failed; on Debian and Ubuntu: apt-get install python3-venv"
    }
fi

install() {
    local log=.venv/pip.log
    .venv/bin/python -m pip install --disable-pip-version-check --quiet "$@" >"$log" 2>&1 || {
        tail -n 20 "$log" >&2
        fail "pip install $* failed; the whole log is in $log"
    }
}

# torch first and by its exact version: an open requirement may bring another build of several gigabytes.
torch=$(grep '^torch==' "$constraints")
echo "setup: installing $torch"
install "$torch"
echo "setup: installing microadam-dist and its tools (1 to 3 minutes)"
DS_BUILD_OPS=0 install -c "$constraints" -e ".[deepspeed,hf,cli,docs,dev]"
cat pyproject.toml CMakeLists.txt "$constraints" launch/setup.sh | cksum >"$stamp"
