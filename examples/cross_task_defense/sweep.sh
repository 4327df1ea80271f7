#!/usr/bin/env bash
# Tasks x N: train, answer and evaluate each, then draw the cross-task heat map and the safety/usefulness curve.
# What is finished is not done again. The paper's grid on a GPU, with DATA from build_data.py:
#   DATA=data BASE=meta-llama/Llama-2-7b-hf TEMPLATE=llama2 TASKS="summarize translate sentiment case cloze mix" \
#     NS="10 100 500 1000 2000" ./sweep.sh output/sweep --cutoff_len 1024
# Without variables: a small grid on the bundled model and sample. Flags after the folder go to train.py.
set -euo pipefail
cd "$(dirname "$0")"
out=${1:-output/sweep}
shift || true
base=${BASE:-smollm2-135m-instruct} template=${TEMPLATE:-chat} tokens=${MAX_NEW_TOKENS:-32} engine=${ENGINE:-transformers}
read -ra tasks <<<"${TASKS:-summarize cloze}"
read -ra ns <<<"${NS:-10 100}"
if [[ -z ${DATA:-} ]]; then
    DATA=$out/data
    python build_data.py --output_dir "$DATA" --tasks "$(IFS=,; echo "${tasks[*]}")" --n_defence "$(IFS=,; echo "${ns[*]}")" \
        --n_base 20 --n_safety 20 --counter_examples 100 --strip_cues
    set -- --config configs/quickstart.yaml "$@"
fi
evaluation=$(ls -d "$DATA"/evaluation* | head -n 1)
answer=(python generate_answers.py --base_model "$base" --prompt_template_path "$template" --input_path "$evaluation"
    --output_path "$out/answers" --num_beams 1 --max_new_tokens "$tokens" --engine "$engine")
"${answer[@]}"
folders=$out/answers/$base
for task in "${tasks[@]}"; do
    for n in "${ns[@]}"; do
        adapter=$out/${task}_$n
        if [[ ! -f $adapter/run.json ]]; then
            python train.py "$@" --base_model "$base" --prompt_template_name "$template" --output_dir "$adapter" \
                --overwrite_output_dir --data_path "$(ls "$DATA"/training/saferpaca_Instructions_*_"${n}_$task"{,_*}.json \
                2>/dev/null | grep -v manifest | head -n 1)"
        fi
        "${answer[@]}" --lora_weights "$adapter"
        folders+=,$out/answers/$adapter
    done
done
python evaluate.py --answers "$folders" --output_dir "$out/evaluation"
