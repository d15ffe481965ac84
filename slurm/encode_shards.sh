#!/bin/bash
# Encode videos to shards of latents with a job array, one GPU per task. Submit from the repository root:
#
#   sbatch slurm/encode_shards.sh --config configs/encode_ltx.yaml source=/shared/videos out=/shared/shards
#   sbatch --array=0-63 --partition=gpu slurm/encode_shards.sh ...       # more tasks
#   python data_prep/encode_shards.py --config ... out=/shared/shards --status
#
# Arguments after the script's name go to data_prep/encode_shards.py. Task k of n encodes shards k, k + n, k + 2 n ...;
# the last task to finish completes the set. If tasks are killed, submit the same command again to do the remaining work,
# or only some tasks, such as 3 and 7 of 16, with --array=3,7 and NUM_PARTS=16.
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
