#!/usr/bin/env bash
# The quickstart from end to end, on the bundled model and the bundled sample: train, answer, evaluate.
#   ./quickstart.sh [folder for the results]
set -euo pipefail
cd "$(dirname "$0")"
out=${1:-output/quickstart}
[[ $out != *..* ]] || { echo "error: give a folder without .." >&2 && exit 2; }
sample=../../data/sample/cross_task_defense/evaluation_stripped
model=smollm2-135m-instruct
answer=(python generate_answers.py --base_model "$model" --prompt_template_path chat --input_path "$sample" --num_beams 1 --max_new_tokens 32)

torchrun --standalone train.py --config configs/quickstart.yaml --output_dir "$out/adapter"
"${answer[@]}" --output_path "$out/answers" --overwrite
"${answer[@]}" --output_path "$out/answers" --lora_weights "$out/adapter" --overwrite
python evaluate.py --answers "$out/answers/$model,$out/answers/$out/adapter" --output_dir "$out/evaluation"
