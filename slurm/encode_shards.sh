#!/bin/bash
# Encode videos to shards of latents with a job array, one GPU per task. Submit from the repository root:
#
#   sbatch slurm/encode_shards.sh --config configs/encode_ltx.yaml source=/shared/videos out=/shared/shards
#   sbatch --array=0-63 --partition=gpu slurm/encode_shards.sh ...       # more tasks
#   python data_prep/encode_shards.py --config ... out=/shared/shards --status
#
# All arguments go to data_prep/encode_shards.py. Task k of n encodes shards k, k + n, k + 2 n ...; the last task to end
# finishes the set. If tasks were killed, submit the same command again: it encodes what is left. To rerun only tasks 3
# and 7 of 16, use --array=3,7 with NUM_PARTS=16.
#SBATCH --job-name=flowception-encode
#SBATCH --array=0-7
#SBATCH --ntasks=1
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.log
set -euo pipefail

export FLOWCEPTION_HOME=${FLOWCEPTION_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}
source "$FLOWCEPTION_HOME/slurm/parts.sh" # sources the site; sets NUM_PARTS
exec srun python -u data_prep/encode_shards.py "$@" part="$SLURM_ARRAY_TASK_ID" num_parts="$NUM_PARTS"
