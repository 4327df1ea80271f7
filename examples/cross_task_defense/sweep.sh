#!/usr/bin/env bash
# Tasks x N: train, answer and evaluate each, then draw the cross-task heat map and the safety/usefulness curve.
# What is finished is not done again, what was interrupted goes on: for other flags take another folder.
# The paper's grid on a GPU, with DATA from build_data.py:
#   DATA=data BASE=meta-llama/Llama-2-7b-hf TEMPLATE=llama2 TASKS="summarize translate sentiment case cloze mix" \
#     NS="10 100 500 1000 2000" ./sweep.sh output/sweep --cutoff_len 1024
# Without variables: a small grid on the bundled model and sample. Flags after the folder go to train.py.
# The README's claim with seeds and controls (hours on two cores; SETTINGS: of which config):
#   COUNTER_EXAMPLES=240 TASKS=summarize NS="0 80" SEEDS="1 2 3" ./sweep.sh output/claim
#   COUNTER_EXAMPLES=240 TASKS=summarize NS=80 SEEDS="1 2 3" CONTROL=--benign_refusals ./sweep.sh output/claim-benign
#   … CONTROL=--shuffled_refusals ./sweep.sh output/claim-shuffled
# DOCUMENTS=documents.jsonl: your own, of own_documents.py, in place of the sample's.
# The paper's own settings on the bundled model and sample:
#   COUNTER_EXAMPLES=240 TASKS=summarize NS=80 SEEDS="1 2 3" SETTINGS=configs/paper-on-sample.yaml TEMPLATE=llama2 ./sweep.sh output/claim-paper
set -euo pipefail
shopt -s nullglob
cd "$(dirname "$0")"
out=${1:-output/sweep}
shift || true
base=${BASE:-smollm2-135m-instruct} template=${TEMPLATE:-chat} tokens=${MAX_NEW_TOKENS:-32} engine=${ENGINE:-transformers}
read -ra tasks <<<"${TASKS:-summarize cloze}"
read -ra ns <<<"${NS:-10 100}"
read -ra seeds <<<"${SEEDS:-42}"
stop() { echo "error: $1" >&2 && exit 2; }
[[ $out$base != *..* ]] || stop "folder and BASE: give paths without .."
[[ $engine != server ]] || stop "ENGINE=server: a server does not know the adapters that are trained here"
if [[ -z ${DATA:-} ]]; then
    DATA=$out/data
    python build_data.py --output_dir "$DATA" --tasks "$(IFS=,; echo "${tasks[*]}")" --n_defence "$(IFS=,; echo "${ns[*]}")" \
        --n_base 20 --n_safety 20 --counter_examples "${COUNTER_EXAMPLES:-100}" --strip_cues \
        ${DOCUMENTS:+--documents "$DOCUMENTS"} ${CONTROL:-}
    set -- --config "${SETTINGS:-configs/quickstart.yaml}" "$@"
fi
evaluation=("$DATA"/evaluation*)
[[ ${#evaluation[@]} == 1 ]] || stop "$DATA: expected one folder evaluation…, found ${#evaluation[@]}"
answer=(python generate_answers.py --base_model "$base" --prompt_template_path "$template" --input_path "${evaluation[0]}"
    --output_path "$out/answers" --num_beams 1 --max_new_tokens "$tokens" --engine "$engine")
"${answer[@]}"
folders=$out/answers/$base
for task in "${tasks[@]}"; do
    for n in "${ns[@]}"; do
        data=()
        for name in "$task" "${task/summarize/summrize}"; do # the second, of the paper's files
            [[ ${#data[@]} == 0 ]] || break
            for file in "$DATA"/training/saferpaca_Instructions_*_"${n}_$name"{,_*}.json; do
                [[ $file == *.manifest.json ]] || data+=("$file")
            done
        done
        [[ ${#data[@]} == 1 ]] || stop "$DATA/training: expected one set of $n rows of $task, found ${#data[@]}"
        for seed in "${seeds[@]}"; do
            adapter=$out/${task}_$n
            [[ ${#seeds[@]} == 1 ]] || adapter+=_seed$seed
            if [[ ! -f $adapter/run.json ]]; then
                begun=("$adapter"/checkpoint-*/trainer_state.json)
                [[ ${#begun[@]} == 0 ]] && start=(--overwrite_output_dir) || start=(--resume_from_checkpoint latest)
                python train.py "$@" --base_model "$base" --prompt_template_name "$template" --output_dir "$adapter" \
                    --data_path "${data[0]}" --seed "$seed" "${start[@]}"
            fi
            "${answer[@]}" --lora_weights "$adapter"
            folders+=,$out/answers/$adapter
        done
    done
done
python evaluate.py --answers "$folders" --output_dir "$out/evaluation"
