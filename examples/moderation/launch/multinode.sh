#!/usr/bin/env bash
# The paper's run on 2 nodes of 8 GPUs under slurm. Edit launch/slurm_multinode.sh at the repository's root first.
#   launch/multinode.sh
#   SBATCH_PARTITION=gpu launch/multinode.sh --resume_from_checkpoint latest     # sbatch reads SBATCH_* variables
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# 2 x 8 GPUs x 8 rows = the paper's 128.
exec sbatch ../../launch/slurm_multinode.sh train.py --config configs/paper.yaml \
    --per_device_train_batch_size 8 --save_strategy steps --save_steps 250 "$@"    # a job that ends goes on from there
