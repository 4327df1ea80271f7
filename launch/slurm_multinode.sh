#!/usr/bin/env bash
# Any recipe on several nodes. Submit from the recipe's folder; the arguments are the script and its flags:
#   cd examples/moderation && sbatch ../../launch/slurm_multinode.sh train.py --config configs/paper.yaml
# Edit the lines marked EDIT, or override them on the command line (sbatch --nodes 4 --partition … …).
#SBATCH --job-name=guardrail
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1          # one torchrun a node; it starts one process a GPU
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64           # EDIT: all cores of a node
#SBATCH --time=24:00:00              # EDIT
#SBATCH --output=%x-%j.log
##SBATCH --partition=gpu             # EDIT: remove one # and name your partition
##SBATCH --account=project           # EDIT: likewise
set -euo pipefail
[[ $# -gt 0 ]] || { echo "usage: sbatch $0 train.py [flags]" >&2; exit 2; }

# EDIT: how a node finds Python. One of:
#   source "$HOME/miniforge3/etc/profile.d/conda.sh" && conda activate guardrail-recipes
#   source /path/to/guardrail-recipes/.venv/bin/activate
# EDIT: where nodes have no network, fetch model and data on the login node first, then: export HF_HUB_OFFLINE=1
# EDIT: where the nodes' network has several interfaces: export NCCL_SOCKET_IFNAME=ib0
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}" TOKENIZERS_PARALLELISM=false

cd "${SLURM_SUBMIT_DIR:-$PWD}"       # output_dir must lie on a file system that every node sees
nodes="${SLURM_JOB_NUM_NODES:-${SLURM_NNODES:-2}}"
gpus="${SLURM_GPUS_ON_NODE:-8}"
head="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
port="$((20000 + SLURM_JOB_ID % 20000))"     # two jobs that share a node do not meet

export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-}"     # srun no longer takes it over from sbatch
exec srun --kill-on-bad-exit=1 torchrun \
    --nnodes="$nodes" --nproc_per_node="$gpus" \
    --rdzv_backend=c10d --rdzv_id="$SLURM_JOB_ID" --rdzv_endpoint="$head:$port" \
    "$@"
