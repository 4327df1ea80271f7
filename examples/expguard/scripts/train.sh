#!/usr/bin/env bash
# The paper's command, flag by flag: Qwen2.5-7B, full fine-tune, 4 GPUs. Later flags win:
#   NPROC=8 bash scripts/train.sh --gradient_accumulation_steps 1 --packing --stop_after_epoch 2
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
arguments=(
    --dataset_name expguardmix
    --model_type qwen2.5-7b
    --model_name_or_path Qwen/Qwen2.5-7B
    --output_dir output/expguard-7b
    --per_device_train_batch_size 4
    --gradient_accumulation_steps 2
    --max_seq_len 4096
    --learning_rate 5e-6
    --warmup_ratio 0.03
    --weight_decay 0.0
    --epochs 3
    --seed 42
    --wandb_mode disabled               # the paper: online
    --attn_implementation flash_attention_2
    --do_train
    --bf16
    --use_gradient_checkpointing
    # ours: the paper trains bf16 weights whole on each GPU; float32 ones are split
    --fsdp "full_shard auto_wrap"
    --fsdp_transformer_layer_cls_to_wrap Qwen2DecoderLayer
)
exec torchrun --standalone --nproc_per_node="${NPROC:-4}" train.py "${arguments[@]}" "$@"
