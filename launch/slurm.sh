#!/usr/bin/env bash
# Several machines under Slurm: one task per machine, torchrun starts a rank for each of its GPUs.
#   sbatch --nodes=2 launch/slurm.sh --model ... --data ... --output ...
# The arguments are those of launch/train.py. --resume last goes on after a requeue.
#SBATCH --job-name=microadam
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --requeue
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# One port for each job on a machine; the range avoids the ephemeral ports.
port=$((15000 + SLURM_JOB_ID % 10000))
srun .venv/bin/torchrun \
    --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node gpu \
    --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$head_node:$port" \
    launch/train.py --deepspeed configs/deepspeed/zero3_bf16.json "$@"
