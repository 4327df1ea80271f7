#!/usr/bin/env bash
# The quickstart: bundled model, bundled sample data, minutes on two CPU cores; a GPU is used if there.
#   launch/quickstart.sh                                   # one process
#   NPROC=2 launch/quickstart.sh --output_dir output/two   # two; flags override the config
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec torchrun --nproc_per_node="${NPROC:-1}" train.py --config configs/quickstart.yaml "$@"
