#!/usr/bin/env bash
# The paper's run with DeepSpeed ZeRO-3 in FSDP's place (at the root: pip install -e ".[deepspeed]"):
#   launch/zero3.sh
#   NPROC=4 launch/zero3.sh --model_name_or_path meta-llama/Llama-3.1-8B --per_device_train_batch_size 32
# zero2.json splits gradients and optimizer state only: faster where the weights fit (see docs/scaling.md).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec torchrun --nproc_per_node="${NPROC:-8}" train.py --config configs/paper.yaml \
    --fsdp "" --deepspeed ../../launch/zero3.json --output_dir output/beavertails-zero3 "$@"
