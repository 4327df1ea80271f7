#!/usr/bin/env bash
# The paper's evaluation of one guard, on its benchmarks of one task or both:
#   bash scripts/safety_eval.sh <model_name> <task_type prompt|response|both> [local model path] [flags of evaluate.py]
#   bash scripts/safety_eval.sh expguard both output/expguard-7b --engine vllm
#   bash scripts/safety_eval.sh wildguard prompt --benchmarks xstest_prompt
# Results: output/safety_eval/<model_name>_<task_type>, unless --output_dir says otherwise.
set -euo pipefail
usage() { sed -n '3s/^# */error: expected /p' "$0" >&2 && exit 2; }
[[ $# -ge 2 && $2 =~ ^(prompt|response|refusal|both)$ ]] || usage
name=$1 task=$2 && shift 2
guard=$name
if [[ $# -gt 0 && $1 != -* ]]; then
    [[ -d $1 ]] || { echo "error: $1 is no folder; the third word is a local model, flags begin with --" >&2 && exit 2; }
    guard=$name=$(cd "$1" && pwd) && shift
fi
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
exec python "$here/evaluate.py" --guards "$guard" --task_type "$task" \
    --output_dir "output/safety_eval/${name//[^A-Za-z0-9._-]/_}_$task" "$@"
