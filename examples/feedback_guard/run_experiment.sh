#!/usr/bin/env bash
# One stage of the experiment, or all of them:
#   ./run_experiment.sh process|train|evaluate|full [config.json] [--set section.key=value ...]
# Without a config it is the quickstart (configs/quickstart.json); the original's values are in research_config.json.
# Relative paths in a config are relative to this folder. A stage that was killed goes on after the same command.
# What is printed is also kept, in experiment.results_dir/experiment_YYYYMMDD_HHMMSS.log.
set -euo pipefail
stop() { echo "$1" >&2 && exit 2; }
case ${1:-} in
process | train | evaluate) stages=("$1") ;;
full) stages=(process train evaluate) ;;
*) stop "usage: $0 process|train|evaluate|full [config.json] [--set section.key=value ...]" ;;
esac
shift
flags=()
if [[ ${1:-} == --config ]]; then shift; fi
if [[ $# -gt 0 && $1 != --* ]]; then
    [[ -f $1 ]] || stop "error: $1: no such config file"
    flags=(--config "$(realpath "$1")")
    shift
fi
flags+=("$@")
cd "$(dirname "$0")"
for flag in "${flags[@]}"; do
    if [[ $flag == -h || $flag == --help ]]; then exec python "${stages[0]}.py" --help; fi
done
read_config='from common.run import run_cli; from config import config_from_argv
run_cli(lambda: print(config_from_argv().experiment.results_dir))'
results=$(python -c "$read_config" "${flags[@]}" 2>/dev/null) || exec python "${stages[0]}.py" "${flags[@]}"
mkdir -p "$results"
log=$results/experiment_$(date +%Y%m%d_%H%M%S).log
for stage in "${stages[@]}"; do
    python "$stage.py" "${flags[@]}" 2> >(tee -a "$log" >&2) | tee -a "$log"
done
