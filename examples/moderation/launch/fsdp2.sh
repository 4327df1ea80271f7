#!/usr/bin/env bash
# The paper's command, flag by flag: LLaMA-7B, full fine-tune, 8 GPUs. Changed: only the names of the two splits.
# Flags marked "mapped" are gone from transformers; train.py says once what it uses instead. Later flags win:
#   NPROC=4 launch/fsdp2.sh --model_name_or_path Qwen/Qwen2.5-1.5B --fsdp_transformer_layer_cls_to_wrap Qwen2DecoderLayer
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
arguments=(
    --model_name_or_path huggyllama/llama-7b
    --train_data_name_or_path PKU-Alignment/BeaverTails:330k_train  # the paper's README has :train, which is gone
    --eval_data_name_or_path PKU-Alignment/BeaverTails:330k_test    # likewise :test
    --output_dir output/beavertails-7b
    --num_train_epochs 4
    --per_device_train_batch_size 16    # 128 in all on 8 GPUs: with NPROC=4 pass 32, or 2 accumulation steps
    --per_device_eval_batch_size 16
    --gradient_accumulation_steps 1
    --evaluation_strategy steps         # mapped: --eval_strategy
    --eval_steps 250
    --save_strategy epoch
    --save_total_limit 1
    --learning_rate 1e-5
    --weight_decay 0.1
    --warmup_ratio 0.03                 # mapped: --warmup_steps
    --lr_scheduler_type cosine
    --logging_steps 1
    --fsdp "full_shard auto_wrap"       # mapped: FSDP2
    --fsdp_transformer_layer_cls_to_wrap LlamaDecoderLayer  # mapped; another model's layer class goes here
    --gradient_checkpointing
    --bf16 True
    --tf32 True
)
exec torchrun --nproc_per_node="${NPROC:-8}" train.py "${arguments[@]}" "$@"
