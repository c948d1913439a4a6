#!/usr/bin/env bash
# Several machines with DeepSpeed's own launcher (it needs passwordless ssh and the same folder on each of them):
#   bash launch/multi_node.sh launch/hostfile.example --model ... --data ... --output ...
# The arguments after the host file are those of launch/train.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
hostfile=${1:?usage: bash launch/multi_node.sh HOSTFILE [train.py arguments]}
shift
exec .venv/bin/deepspeed --hostfile "$hostfile" launch/train.py \
    --deepspeed configs/deepspeed/zero3_bf16.json "$@"
