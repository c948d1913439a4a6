#!/usr/bin/env bash
# Everything that needs a GPU, in at most ten minutes: tests, then measurements. A part that fails or takes too long does
# not stop the next one. A table at the end; the exit code is 0 if all have passed.
#
#   bash launch/bench/gpu_all.sh                       JSON in launch/bench/results, logs in runs/gpu_all
#   OUT=folder bash launch/bench/gpu_all.sh            both in that folder
#   bash launch/bench/gpu_all.sh --only nccl,bench     these parts
#   bash launch/bench/gpu_all.sh --dry-run             shows the parts with their limits and commands, and runs nothing
#
# It needs the package installed with the extras deepspeed, hf, cli and dev; PYTHON=... chooses the interpreter. What is
# not there (compute-sanitizer, bitsandbytes, torchao) is named and left out.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

usage() {
    sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}" >&2
    exit 2
}

only='' dry_run=''
while (($#)); do
    case $1 in
        --only) only=${2:?--only needs the names of parts} && shift ;;
        --dry-run) dry_run=1 ;;
        *) usage ;;
    esac
    shift
done

python=${PYTHON:-}
if [[ -z $python ]]; then
    if [[ -x .venv/bin/python ]]; then python=.venv/bin/python; else python=python3; fi
fi
json=${OUT:-launch/bench/results} logs=${OUT:-runs/gpu_all} card=GPU

parts() {
    local bits=tests/gpu/test_cuda_backend.py
    tests bits 60 "$bits" -k 'not sanitizer' -n 8
    tests sanitizers 70 "$bits" -k sanitizer -n 3
    tests nccl 150 tests/gpu/test_nccl.py -n 6
    part bench 50 "$python" -c 'from microadam_dist.cli import main; main()' \
        bench step --device cuda --model 7b --dtype bf16 --json "$json/step_7b_$card.json"
    part single-7b 50 "$python" launch/bench/single_gpu.py --model 7b --steps 20 --json "$json/single_gpu_7b_$card.json"
    part single-13b 60 "$python" launch/bench/single_gpu.py --model 13b --steps 10 \
        --json "$json/single_gpu_13b_$card.json"
    part quality 150 "$python" launch/study.py configs/studies/gpu/llama_85m.yaml --jobs 3 \
        --output "$logs/studies" --json "$json/quality_85m_$card.json"
}

tests() { # NAME SECONDS PYTEST_ARGUMENTS...
    part "$1" "$2" "$python" launch/bench/gpu_tests.py --json "$json/$1_$card.json" "${@:3}"
}

names=() table=() failed=0 total=0

# Do with a part what $mode says.
part() { # NAME SECONDS COMMAND...
    local name=$1 limit=$2
    shift 2
    if [[ $mode == list ]]; then
        names+=("$name")
        total=$((total + limit))
    elif [[ -n $only && ",$only," != *",$name,"* ]]; then
        return
    elif [[ $mode == show ]]; then
        printf '%-10s %4d s ' "$name" "$limit"
        printf ' %q' "$@"
        echo
    else
        run "$name" "$limit" "$@"
    fi
}

run() { # NAME SECONDS COMMAND...
    local name=$1 limit=$2 status=0 start=$SECONDS result=passed last=''
    shift 2
    echo "== $name, at most $limit s"
    timeout --signal=INT --kill-after=10 "$limit" "$@" 2>&1 | tee "$logs/$name.log" || status=$?
    case $status in
        0) ;;
        124 | 137) result="over its limit" ;;
        *) result="failed, exit code $status" ;;
    esac
    ((status == 0)) || failed=1
    # The last line of the tests' logs counts them.
    [[ $* != *gpu_tests.py* ]] || last=$(tail -n 1 "$logs/$name.log")
    table+=("$(printf '%-10s %4d s of %4d  %-22s  %.120s' "$name" $((SECONDS - start)) "$limit" "$result" "$last")")
}

mode=list
parts
for name in ${only//,/ }; do
    [[ " ${names[*]} " == *" $name "* ]] || {
        echo "gpu_all: --only $name: the parts are ${names[*]}" >&2
        exit 2
    }
done
if [[ -n $dry_run ]]; then
    mode=show
    parts
    echo "all: at most $total s"
    exit 0
fi
card=$("$python" - <<'EOF'
import re
import sys

import torch

if not torch.cuda.is_available():
    sys.exit(f"gpu_all: torch {torch.__version__} of {sys.executable} sees no GPU")
print(re.sub("[^a-z0-9]+", "_", torch.cuda.get_device_name().lower().removeprefix("nvidia ")))
EOF
) || exit 1
mkdir -p "$json" "$logs"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false
mode=run
parts
printf '\n%s: JSON in %s, logs in %s\n' "$card" "$json" "$logs"
printf '%s\n' "${table[@]}"
exit $failed
