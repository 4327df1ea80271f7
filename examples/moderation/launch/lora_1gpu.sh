#!/usr/bin/env bash
# One GPU: the paper's data and schedule, LoRA on a 1.5B base. 7B and 8B fit on 80 GB too (docs/scaling.md):
#   launch/lora_1gpu.sh --model_name_or_path meta-llama/Llama-3.1-8B --output_dir output/beavertails-lora-8b
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
arguments=(
    --config configs/paper.yaml
    --fsdp ""                           # paper.yaml splits over GPUs; here is one
    --model_name_or_path Qwen/Qwen2.5-1.5B
    --use_peft
    --learning_rate 2e-4                # ours: LoRA wants about ten times the rate of a full fine-tune
    --gradient_accumulation_steps 8     # 16 x 8 = the paper's 128
    --output_dir output/beavertails-lora
)
exec torchrun --nproc_per_node=1 train.py "${arguments[@]}" "$@"
