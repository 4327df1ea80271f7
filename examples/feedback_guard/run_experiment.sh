#!/usr/bin/env bash
# One stage of the experiment, or all of them:
#   ./run_experiment.sh process|train|evaluate|full [config.json] [--set section.key=value ...]
# Without a config it is the quickstart (configs/quickstart.json); the original's values are in research_config.json.
# Relative paths in a config are relative to this folder. A stage that was killed goes on after the same command.
set -euo pipefail
stop() { echo "$1" >&2 && exit 2; }
usage="usage: $0 process|train|evaluate|full [config.json] [--set section.key=value ...]"
stage=${1:-}
case $stage in
process | train | evaluate) shift && command=("$stage.py") ;;
full) shift && command=(full.py full) ;;
*) stop "$usage" ;;
esac
if [[ ${1:-} == --config ]]; then shift; fi
if [[ $# -gt 0 && $1 != --* ]]; then
    [[ -f $1 ]] || stop "error: $1: no such config file"
    command+=(--config "$(realpath "$1")")
    shift
fi
cd "$(dirname "$0")"
exec python "${command[@]}" "$@"
