#!/usr/bin/env bash
# The paper's launch, for two GPUs or more (on one: python train.py …). Every GPU holds the frozen base in bf16, adapters and head in float32.
#   NPROC=4 launch/multi_gpu.sh meta-llama/Llama-3.1-8B-Instruct output/llama-3.1-8b --epochs 3
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[[ $# -gt 0 ]] || set -- --config configs/paper.yaml
exec accelerate launch --multi-gpu --mixed-precision=bf16 --num-processes="${NPROC:-8}" train.py "$@"
